// Compiled with -mavx2 -mfma.
#define CLLIP_LANES 8
#define CLLIP_ROWS 6
#define CLLIP_INSTRUCTION_SET avx2
#include "all_kernels.h"
