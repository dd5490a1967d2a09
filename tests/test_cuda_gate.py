"""The compile gate for CUDA kernels judges ptxas' words; here it is given some."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "scripts" / "cuda_gate.py"
NAME = (
    "_ZN7fastrnn4cuda14forward_kernelINS0_4LstmENS0_4Bf16ENS0_4TileILi16ELi1ELi4ELi4ELi8EEE"
    "NS0_8SentinelELb0EEEvNS0_13ForwardParamsE"
)
KERNEL = "forward Lstm Bf16 Sentinel <16,1,4,4,8>"


@pytest.fixture(scope="module")
def gate():
    spec = importlib.util.spec_from_file_location("cuda_gate", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(stack: int = 0, stores: int = 0, loads: int = 0, registers: int = 213) -> str:
    return (
        f"ptxas info    : Compiling entry function '{NAME}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {NAME}\n"
        f"    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers\n"
    )


def test_a_clean_kernel_passes(gate):
    assert gate.judge(said()) == ([], {KERNEL: 213})


@pytest.mark.parametrize("wrong", [{"stack": 480}, {"stores": 4}, {"loads": 4}, {"registers": 256}])
def test_local_memory_spills_and_registers_are_refused(gate, wrong):
    complaints, _ = gate.judge(said(**wrong))
    assert len(complaints) == 1
    assert KERNEL in complaints[0]


def test_kernels_with_regularisers_are_told_apart(gate):
    name = NAME.replace("SentinelELb0E", "SentinelELb0ELb1E")
    assert gate.short(NAME) == KERNEL
    assert gate.short(name) == f"{KERNEL} regularised"
    assert gate.short(name.replace("Lb1E", "Lb0E")) == KERNEL


def test_batch_normalised_kernels_are_named(gate):
    name = NAME.replace("14forward", "21bnlstm_forward").replace(
        "INS0_4LstmENS0_4Bf16", "INS0_4Bf16"
    )
    assert gate.short(name) == KERNEL.replace("Lstm", "BnLstm")
    assert gate.products(gate.short(name)) == 32


def test_kernels_of_single_steps_are_named(gate):
    product = (
        "_ZN7fastrnn4cuda20steps_product_kernelINS0_4Bf16ENS0_11ProductTileILi4ELi4ELi1ELi2ELi4ELi4ELi4E"
        "EEEEvPKNS0_11StepsParamsEii"
    )
    row = (
        "_ZN7fastrnn4cuda24steps_forward_row_kernelINS0_4LstmENS0_4Fp16ELi512ELb0EEEvPKNS0_"
        "18StepsForwardParamsEi"
    )
    columns = (
        "_ZN7fastrnn4cuda29steps_backward_columns_kernelINS0_4Bf16ELi8ELi512ELb0EEEvPKNS0_"
        "21StepsBnBackwardParamsEi"
    )
    assert gate.short(columns) == "steps_backward_columns Bf16 <8,512>"
    assert gate.short(product) == "steps_product Bf16 <4,4,1,2,4,4,4>"
    assert gate.short(row) == "steps_forward_row Lstm Fp16 <512>"


def test_silence_is_no_proof(gate):
    assert gate.judge("") == (["ptxas named no kernel"], {})


@pytest.mark.parametrize(
    ("name", "count"),
    [
        (KERNEL, 32),
        (f"{KERNEL} regularised", 32),
        ("backward RhnILb1 Tf32 Sentinel <16,1,4,0,8>", 16),
        ("forward RhnILb0 Bf16 Sentinel <16,2,4,0,8>", 48),
        ("backward Lstm Bf16x3 Sentinel <16,2,4,4,8>", 96),
        ("forward GruILb0 Tf32 Sentinel <16,1,8,4,8>", 48),
        ("forward RnnILb1 Fp16 Local <64,1,1,0,2>", 8),
        ("forward ProjectedLstm Tf32 Sentinel <16,1,4,3,8,1>", 40),
        ("backward ProjectedLstm Tf32 Sentinel <16,1,4,3,8,1>", 72),
        ("steps_product Bf16 <8,16,2,4,1,2,3>", 64),
        ("steps_product Bf16x3 <4,4,1,2,4,4,4>", 24),
    ],
)
def test_products_of_a_tile(gate, name, count):
    assert gate.products(name) == count
