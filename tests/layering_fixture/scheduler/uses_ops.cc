// Planted: the scheduler knows the engine contract only, and never sleeps.
#include "engine/batch.h"
#include "engine/ops.h"
void Planted() { usleep(1); }
