// Planted: no gRPC in the scheduler; no assert, no singleton, no using namespace std.
#include <grpcpp/grpcpp.h>
using namespace std;
void Planted(int x) {
  assert(x > 0);
  Registry::Instance().Touch();
}
