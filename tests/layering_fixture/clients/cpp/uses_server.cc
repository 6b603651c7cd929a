// Planted: clients know the protocol, not the server. They may sleep.
#include "server/tokenizer.h"
void Planted() { usleep(1); }
