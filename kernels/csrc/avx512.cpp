// Compiled with -mavx512f and its companions.
#define CLLIP_LANES 16
#define CLLIP_ROWS 12
#define CLLIP_INSTRUCTION_SET avx512
#include "all_kernels.h"
