"""How the CPU kernels are asked to run: the ``plan`` of the operators."""

from __future__ import annotations

__all__ = ["Plan", "read_plan"]

_PARTITIONS = {"units": 1, "rows": 2}


class Plan:
    """A plan string, read once: comma-separated words, see ``fastrnn.dispatch``."""

    __slots__ = ("bf16", "linear", "partition")

    def __init__(self, text: str) -> None:
        self.bf16 = self.linear = False
        self.partition = 0
        for word in text.split(",") if text else ():
            if word == "bf16":
                self.bf16 = True
            elif word == "linear":
                self.linear = True
            elif word.startswith("partition=") and word[10:] in _PARTITIONS:
                self.partition = _PARTITIONS[word[10:]]
            else:
                raise ValueError(
                    f"plan: got {word!r}, expected words of bf16, linear, partition=units, "
                    "partition=rows"
                )


_plans: dict[str, Plan] = {"": Plan("")}


def read_plan(text: str) -> Plan:
    plan = _plans.get(text)
    if plan is None:
        plan = _plans[text] = Plan(text)
    return plan
