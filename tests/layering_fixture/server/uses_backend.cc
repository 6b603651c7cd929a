// Planted: the server may not know a backend, and sentencepiece stays behind its wall.
#include <sentencepiece_processor.h>

#include "engine/cpu/cpu_ops.h"
