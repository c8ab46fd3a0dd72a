// The kernels of avx2.cpp, compiled with AVX-VNNI: one instruction multiplies 32 codes by 32 activations and adds them by fours.
#include "avx2.cpp"
