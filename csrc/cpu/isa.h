// Names the instruction set this translation unit is compiled for: one namespace per set.
#pragma once
#ifndef FASTRNN_ISA_NAME
#define FASTRNN_ISA_NAME baseline
#endif
#define FASTRNN_CONCAT_(a, b) a##b
#define FASTRNN_CONCAT(a, b) FASTRNN_CONCAT_(a, b)
#define FASTRNN_ISA FASTRNN_CONCAT(isa_, FASTRNN_ISA_NAME)
