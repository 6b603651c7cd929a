// Planted: Highway outside engine/cpu, and a thread outside the named files.
#include <hwy/highway.h>

#include <thread>
std::thread* planted_thread;
