// The kernels of avx512vnni.cpp, compiled with VBMI: base-3 looks its digits up.
#include "avx512vnni.cpp"
