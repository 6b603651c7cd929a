// Planted: the engine may not know the server, and JSON has one home.
#include <nlohmann/json.hpp>

#include "server/tokenizer.h"
