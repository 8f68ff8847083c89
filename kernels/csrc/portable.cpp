// Any CPU: vectors of four, which is SSE2 on x86-64 and NEON on Arm.
#define CLLIP_LANES 4
#define CLLIP_ROWS 6
#define CLLIP_INSTRUCTION_SET portable
#include "all_kernels.h"
