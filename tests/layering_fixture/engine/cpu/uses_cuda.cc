// Planted: the backends do not know each other. Highway is fine here.
#include "engine/cuda/device.h"
#include "hwy/highway.h"
