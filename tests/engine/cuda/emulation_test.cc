// The emulation itself: what it computes, and that every planted bug is caught.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "engine/cuda/device.h"
#include "gtest/gtest.h"

namespace minitron::engine::cuda {
namespace {

using emulation::Order;

// A device, a stream and buffers for one test; frees everything.
class EmulationTest : public testing::Test {
 protected:
  EmulationTest() { EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess); }
  ~EmulationTest() override {
    for (void* pointer : device_) cudaFree(pointer);
    cudaStreamDestroy(stream_);
    emulation::SetOrder(Order::kForward);
    EXPECT_EQ(emulation::CountLiveObjects(), emulation::LiveObjects());
  }
  template <typename T>
  T* Allocate(int count) {
    void* pointer = nullptr;
    EXPECT_EQ(cudaMalloc(&pointer, sizeof(T) * count), cudaSuccess);
    device_.push_back(pointer);
    return static_cast<T*>(pointer);
  }
  template <typename... Parameters, typename... Arguments>
  void Run(void (*kernel)(Parameters...), Dim3 grid, Dim3 block, size_t shared, const Arguments&... arguments) {
    ASSERT_EQ(Launch(kernel, grid, block, shared, LaunchStream(stream_, early_), arguments...), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  }
  // Death tests: the message of the abort.
  template <typename... Parameters, typename... Arguments>
  void ExpectDeath(const char* message, void (*kernel)(Parameters...), Dim3 block, size_t shared,
                   const Arguments&... arguments) {
    EXPECT_DEATH(Run(kernel, {1}, block, shared, arguments...), message);
  }

  cudaStream_t stream_ = nullptr;
  bool early_ = false;
  std::vector<void*> device_;
};

KERNEL(256) ReverseBlock(int* values) {
  int* shared = reinterpret_cast<int*>(SharedMemory());
  const int t = static_cast<int>(ThreadIndex().x), n = static_cast<int>(BlockDim().x);
  const int first = static_cast<int>(BlockIndex().x) * n;
  shared[t] = values[first + t];
  SyncThreads();
  values[first + t] = shared[n - 1 - t];
}

TEST_F(EmulationTest, BarriersOrderABlockInEveryFiberOrder) {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    emulation::SetOrder(order, 3);
    int* values = Allocate<int>(3 * 96);
    for (int i = 0; i < 3 * 96; ++i) values[i] = i;
    Run(&ReverseBlock, {3}, {96}, 96 * sizeof(int), values);
    for (int i = 0; i < 3 * 96; ++i) EXPECT_EQ(values[i], i / 96 * 96 + 95 - i % 96);
  }
}

KERNEL(32) WarpVotes(int* out) {
  const int lane = Lane();
  int sum = lane;
  for (int mask = 16; mask > 0; mask /= 2) sum += ShuffleXor(sum, mask);
  const uint32_t odd = Ballot(lane % 2 == 1);
  const int first = Shuffle(lane + 100, 0);
  const int below = ShuffleUp(lane, 1);
  out[lane] = sum == 496 && odd == 0xAAAAAAAAu && first == 100 && below == (lane > 0 ? lane - 1 : 0) &&
              Any(lane == 7) && !Any(lane == 40);
}

TEST_F(EmulationTest, WarpCollectivesExchangeValues) {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    emulation::SetOrder(order, 5);
    int* out = Allocate<int>(32);
    Run(&WarpVotes, {1}, {32}, 0, out);
    EXPECT_EQ(std::count(out, out + 32, 1), 32);
  }
}

// c = a * b through ldmatrix and mma, with a [16, 16] row-major and b [16, 8] row-major in shared memory.
KERNEL(32) MultiplyTile(const Bf16* a, const Bf16* b, float* c) {
  Bf16* shared_a = reinterpret_cast<Bf16*>(SharedMemory());
  Bf16* shared_b = shared_a + 256;
  const int lane = Lane();
  for (int i = lane; i < 256; i += 32) shared_a[i] = a[i];
  for (int i = lane; i < 128; i += 32) shared_b[i] = b[i];
  SyncWarp();
  uint32_t fragment_a[4], fragment_b[4];
  LoadMatrix4(fragment_a, shared_a + lane % 16 * 16 + lane / 16 * 8);
  LoadMatrix4Transposed(fragment_b, shared_b + lane % 16 * 8);
  float sums[4] = {};
  MmaBf16(sums, fragment_a, fragment_b[0], fragment_b[1]);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

TEST_F(EmulationTest, MatrixInstructionsMultiply) {
  Bf16* a = Allocate<Bf16>(256);
  Bf16* b = Allocate<Bf16>(128);
  float* c = Allocate<float>(128);
  for (int i = 0; i < 256; ++i) a[i] = ToBf16(static_cast<float>(i % 23 - 11));
  for (int i = 0; i < 128; ++i) b[i] = ToBf16(static_cast<float>(i % 17 - 8));
  Run(&MultiplyTile, {1}, {32}, 768, a, b, c);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float expected = 0.0f;  // small integers: exact
      for (int k = 0; k < 16; ++k) expected += ToFloat(a[row * 16 + k]) * ToFloat(b[k * 8 + column]);
      EXPECT_EQ(c[row * 8 + column], expected) << row << ", " << column;
    }
  }
}

KERNEL(32) TransposeTile(const uint16_t* in, uint16_t* out) {
  const int lane = Lane();
  const int at = lane / 4 * 8 + lane % 4 * 2;
  const uint32_t result = TransposeMatrix(in[at] | static_cast<uint32_t>(in[at + 1]) << 16);
  out[at] = static_cast<uint16_t>(result);
  out[at + 1] = static_cast<uint16_t>(result >> 16);
}

TEST_F(EmulationTest, TransposeMatrixTransposes) {
  uint16_t* in = Allocate<uint16_t>(64);
  uint16_t* out = Allocate<uint16_t>(64);
  for (int i = 0; i < 64; ++i) in[i] = static_cast<uint16_t>(1000 + i);
  Run(&TransposeTile, {1}, {32}, 0, in, out);
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) EXPECT_EQ(out[i * 8 + j], in[j * 8 + i]);
  }
}

KERNEL(64) CountUp(uint32_t* counter, uint64_t* maximum) {
  AtomicAdd(counter, 1u);
  AtomicMax(maximum, uint64_t{ThreadIndex().x} + 100 * uint64_t{BlockIndex().x});
}

TEST_F(EmulationTest, AtomicsCountEveryThread) {
  uint32_t* counter = Allocate<uint32_t>(1);
  uint64_t* maximum = Allocate<uint64_t>(1);
  *counter = 0;
  *maximum = 0;
  Run(&CountUp, {5}, {64}, 0, counter, maximum);
  EXPECT_EQ(*counter, 320u);
  EXPECT_EQ(*maximum, 463u);
}

TEST_F(EmulationTest, Bf16RoundsToNearestEvenAndKeepsNan) {
  EXPECT_EQ(ToBf16(1.0f).bits, 0x3F80);
  EXPECT_EQ(ToBf16(BitsToFloat(0x3F808000)).bits, 0x3F80);  // a tie goes to even
  EXPECT_EQ(ToBf16(BitsToFloat(0x3F818000)).bits, 0x3F82);
  EXPECT_EQ(ToBf16(-INFINITY).bits, 0xFF80);
  EXPECT_TRUE(std::isnan(ToFloat(ToBf16(NAN))));
}

// --- Planted bugs. ---

KERNEL(32) ReadEarly(const float* in, float* out, bool wait) {
  float* shared = reinterpret_cast<float*>(SharedMemory());
  CpAsync16(shared + 4 * Lane(), in + 4 * Lane(), true);
  CpAsyncCommit();
  if (wait) CpAsyncWait<0>();
  out[Lane()] = shared[4 * Lane()];
  CpAsyncWait<0>();
}

TEST_F(EmulationTest, AsyncCopyIsInvisibleBeforeItsWait) {
  float* in = Allocate<float>(128);
  float* out = Allocate<float>(32);
  std::fill(in, in + 128, 2.0f);
  Run(&ReadEarly, {1}, {32}, 512, in, out, true);
  EXPECT_EQ(std::count(out, out + 32, 2.0f), 32);
  Run(&ReadEarly, {1}, {32}, 512, in, out, false);
  for (int i = 0; i < 32; ++i) EXPECT_TRUE(std::isnan(out[i])) << "shared memory is NaN until written";
}

KERNEL(32) TwoGroups(const float* in, float* out) {
  float* shared = reinterpret_cast<float*>(SharedMemory());
  const int lane = Lane();
  CpAsync16(shared + 4 * lane, in + 4 * lane, true);
  CpAsyncCommit();
  CpAsync16(shared + 128 + 4 * lane, in + 4 * lane, false);
  CpAsyncCommit();
  CpAsyncWait<1>();
  out[lane] = shared[4 * lane];
  out[32 + lane] = shared[128 + 4 * lane];  // still pending
  CpAsyncWait<0>();
  out[64 + lane] = shared[128 + 4 * lane];  // not valid: zeros
}

TEST_F(EmulationTest, AsyncCopiesCompleteByGroup) {
  float* in = Allocate<float>(128);
  float* out = Allocate<float>(96);
  std::fill(in, in + 128, 2.0f);
  Run(&TwoGroups, {1}, {32}, 1024, in, out);
  for (int i = 0; i < 32; ++i) {
    EXPECT_EQ(out[i], 2.0f);
    EXPECT_TRUE(std::isnan(out[32 + i]));
    EXPECT_EQ(out[64 + i], 0.0f);
  }
}

KERNEL(32) MisalignedCopy(const uint16_t* in, int shift) {
  CpAsync16(SharedMemory() + 16 * Lane(), in + 8 * Lane() + shift, true);
  CpAsyncCommit();
  CpAsyncWait<0>();
}
KERNEL(32) MisalignedMatrix() {
  uint32_t registers[4];
  LoadMatrix4(registers, SharedMemory() + 18 * Lane());
}
KERNEL(32) MisalignedLoad(const uint16_t* in, uint32_t* out) { *out = Load16(in + 1).words[0]; }

TEST_F(EmulationTest, MisalignedAccessesAbort) {
  uint16_t* in = Allocate<uint16_t>(512);
  uint32_t* out = Allocate<uint32_t>(1);
  ExpectDeath("misaligned cp.async source.*emulation_test.cc", &MisalignedCopy, {32}, 512, in, 1);
  ExpectDeath("misaligned ldmatrix row", &MisalignedMatrix, {32}, 1024);
  ExpectDeath("misaligned 16-byte load", &MisalignedLoad, {32}, 0, in, out);
}

KERNEL(32) BeginsInMostThreads() { Lane() != 7 ? BeginKernel() : void(); }

TEST_F(EmulationTest, KernelsThatMayStartEarlyMustWaitInEveryThread) {
  Run(&BeginsInMostThreads, {1}, {32}, 0);  // one that may not start early need not
  early_ = true;
  ExpectDeath("did not call BeginKernel: block .0, 0, 0. thread .7, 0, 0.", &BeginsInMostThreads, {32}, 0);
}

KERNEL(32) ForgottenWait(const float* in) {
  CpAsync16(SharedMemory() + 16 * Lane(), in + 4 * Lane(), true);
  CpAsyncCommit();
}

TEST_F(EmulationTest, CopyNobodyWaitedForAborts) {
  float* in = Allocate<float>(128);
  ExpectDeath("a cp.async it never waited for", &ForgottenWait, {32}, 512, in);
}

KERNEL(64) BarrierInABranch() {
  if (ThreadIndex().x < 32) SyncThreads();
}
KERNEL(64) BarriersAtTwoPlaces() {
  if (ThreadIndex().x < 32) {
    SyncThreads();
  } else {
    SyncThreads();
  }
}
KERNEL(32) ShuffleInABranch(int* out) {
  if (Lane() < 16) out[Lane()] = ShuffleXor(Lane(), 1);
}
KERNEL(32) ShuffleAgainstVote(int* out) {
  int value = 0;
  if (Lane() < 16) {
    value = ShuffleXor(Lane(), 1);
  } else {
    value = static_cast<int>(Ballot(true));
  }
  out[Lane()] = value;
}

TEST_F(EmulationTest, DivergentBarriersAndCollectivesAbort) {
  int* out = Allocate<int>(32);
  ExpectDeath("divergent block barrier: .* has ended", &BarrierInABranch, {64}, 0);
  ExpectDeath("divergent block barrier: thread 0 at .*, thread 32 at", &BarriersAtTwoPlaces, {64}, 0);
  ExpectDeath("divergent warp collective: .* has ended", &ShuffleInABranch, {32}, 0, out);
  ExpectDeath("divergent warp collective: thread 0 at .*, thread 16 at", &ShuffleAgainstVote, {32}, 0, out);
}

#if !defined(__SANITIZE_ADDRESS__)  // there the access itself is reported, see planted_bugs.cc
KERNEL(32) WriteAround(float* global, int at, int shared_at) {
  if (Lane() == 0 && shared_at != 0) reinterpret_cast<float*>(SharedMemory())[shared_at] = 1.0f;
  if (Lane() == 0) global[at] = 1.0f;
}

TEST_F(EmulationTest, OverrunsAreFoundWithoutASanitizerToo) {
  float* global = Allocate<float>(8);
  ExpectDeath("written behind an allocation", &WriteAround, {32}, 64, global, 8, 0);
  ExpectDeath("written in front of an allocation", &WriteAround, {32}, 64, global, -1, 0);
  ExpectDeath("outside its shared memory", &WriteAround, {32}, 64, global, 0, 16);
}
#endif

TEST_F(EmulationTest, ImpossibleLaunchesAreRefused) {
  int* out = Allocate<int>(32);
  EXPECT_EQ(Launch(&WarpVotes, {1}, {2048}, 0, stream_, out), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Launch(&WarpVotes, {0}, {32}, 0, stream_, out), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Launch(&WarpVotes, {1, 1 << 16}, {32}, 0, stream_, out), cudaErrorInvalidConfiguration);
  EXPECT_EQ(Launch(&WarpVotes, {1}, {32}, 256 << 10, stream_, out), cudaErrorInvalidConfiguration);
}

// --- The host API. ---

KERNEL(32) AddTo(int* out, int value) {
  if (Lane() == 0) *out += value;
}

TEST_F(EmulationTest, WorkRunsWhenItIsWaitedForAndArgumentsAreTakenAtLaunch) {
  int* out = Allocate<int>(1);
  int staging = 5;
  ASSERT_EQ(cudaMemcpyAsync(out, &staging, sizeof(int), cudaMemcpyHostToDevice, stream_), cudaSuccess);
  int argument = 100;
  ASSERT_EQ(Launch(&AddTo, {1}, {32}, 0, stream_, out, argument), cudaSuccess);
  argument = 0;
  staging = 7;  // too early: the copy has not run, so it sends 7
  EXPECT_NE(*out, 105);
  ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_EQ(*out, 107);
}

TEST_F(EmulationTest, EventsWaitForTheWorkInFrontOfThem) {
  int* out = Allocate<int>(1);
  *out = 0;
  cudaEvent_t event = nullptr;
  cudaStream_t other = nullptr;
  ASSERT_EQ(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
  ASSERT_EQ(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), cudaSuccess);
  Launch(&AddTo, {1}, {32}, 0, stream_, out, 1);
  ASSERT_EQ(cudaEventRecord(event, stream_), cudaSuccess);
  Launch(&AddTo, {1}, {32}, 0, stream_, out, 10);
  ASSERT_EQ(cudaEventSynchronize(event), cudaSuccess);
  EXPECT_EQ(*out, 1);
  Launch(&AddTo, {1}, {32}, 0, stream_, out, 100);
  ASSERT_EQ(cudaEventRecord(event, stream_), cudaSuccess);
  ASSERT_EQ(cudaStreamWaitEvent(other, event, 0), cudaSuccess);
  Launch(&AddTo, {1}, {32}, 0, other, out, 1000);
  ASSERT_EQ(cudaStreamSynchronize(other), cudaSuccess);
  EXPECT_EQ(*out, 1111);
  cudaStreamDestroy(other);
  cudaEventDestroy(event);
}

TEST_F(EmulationTest, GraphsReplayWithTheArgumentsOfTheirCapture) {
  int* out = Allocate<int>(1);
  *out = 0;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  int argument = 3;
  Launch(&AddTo, {1}, {32}, 0, stream_, out, argument);
  argument = 50;  // a replay does not see it
  Launch(&AddTo, {1}, {32}, 0, stream_, out, argument + 1);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaErrorStreamCaptureUnsupported);
  ASSERT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  cudaGraphDestroy(graph);
  ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_EQ(*out, 0) << "capturing runs nothing";
  for (int replay = 1; replay <= 3; ++replay) {
    ASSERT_EQ(cudaGraphLaunch(executable, stream_), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    EXPECT_EQ(*out, replay * 54);
  }
  cudaGraphExecDestroy(executable);
}

TEST_F(EmulationTest, CopiesOutsideDeviceMemoryAreRefused) {
  int* out = Allocate<int>(4);
  int host[8] = {};
  EXPECT_EQ(cudaMemcpyAsync(out, host, 20, cudaMemcpyHostToDevice, stream_), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpyAsync(host, out + 2, 12, cudaMemcpyDeviceToHost, stream_), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpyAsync(host, host + 4, 4, cudaMemcpyHostToDevice, stream_), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(host, 0, 4, stream_), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(out, 0, 16, nullptr), cudaErrorInvalidValue) << "no default stream";
}

TEST_F(EmulationTest, MemoryRunsOutAndComesBack) {
  emulation::SetDevice(1000);
  void *first = nullptr, *second = nullptr;
  EXPECT_EQ(cudaMalloc(&first, 800), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&second, 300), cudaErrorMemoryAllocation);
  cudaFree(first);
  EXPECT_EQ(cudaMalloc(&second, 1000), cudaSuccess);
  cudaFree(second);
  emulation::SetDevice(size_t{1} << 40);
}

TEST_F(EmulationTest, PlantedErrorsComeOnceOrStay) {
  emulation::FailCall(2, cudaErrorIllegalAddress, false);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  emulation::FailCall(1, cudaErrorLaunchFailure, true);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaErrorLaunchFailure);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaErrorLaunchFailure);
  EXPECT_STREQ(cudaGetErrorName(cudaErrorLaunchFailure), "cudaErrorLaunchFailure");
  emulation::FailCall(0, cudaSuccess, false);
}

}  // namespace
}  // namespace minitron::engine::cuda
