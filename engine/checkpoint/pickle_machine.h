// The half of the restricted unpickler that any pickle needs: bounded input, values, stack and memo. What the opcodes
// and globals of a torch checkpoint mean is in torch_unpickler.cc.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "engine/checkpoint/checked_math.h"
#include "engine/checkpoint/safetensors.h"

namespace minitron::engine::pickle {

// Bounds, far above what a checkpoint of kMaxTensors needs (about 20 values a tensor) and small against memory.
inline constexpr int64_t kMaxPickleBytes = 64 << 20;
inline constexpr size_t kMaxValues = 2'500'000;
inline constexpr size_t kMaxStack = 100'000;
inline constexpr size_t kMaxMarks = 64;
inline constexpr uint64_t kMaxStringBytes = kMaxTensorNameBytes;
// torch numbers its storages. Short keys keep the copies in values and tensors small.
inline constexpr size_t kMaxStorageKeyBytes = 32;
inline constexpr uint8_t kProtocol = 2;

enum class Kind {
  kNone,
  kBool,
  kInt,
  kFloat,
  kString,
  kTuple,
  kList,
  kDict,
  kOrderedDictClass,
  kRebuildTensor,
  kStorageClass,
  kStorage,
  kTensor
};

// For error messages, Python's word.
const char* KindName(Kind kind);

// Values refer to each other by index into the unpickler's arena: nothing is freed before the end, so cycles made
// through the memo cost nothing and no destructor recurses.
using ValueId = uint32_t;

struct Value {
  Kind kind = Kind::kNone;
  DType dtype = DType::kBf16;       // kStorageClass, kStorage
  int64_t integer = 0;              // kBool, kInt; kStorage: elements; kTensor: index into tensors
  std::string string = {};          // kString; kStorage: key
  std::vector<ValueId> items = {};  // kTuple, kList; kDict: key, value, key, value ...
};

// Every error is INVALID_ARGUMENT with the byte position.
class PickleMachine {
 protected:
  PickleMachine(const uint8_t* data, int64_t size) : data_(data), size_(static_cast<uint64_t>(size)) {}
  ~PickleMachine() = default;

  absl::Status Bad(const std::string& what) const {
    return absl::InvalidArgumentError(absl::StrCat("data.pkl, byte ", at_, ": ", what));
  }

  // Input. A little-endian T; `count` bytes, at most kMaxStringBytes; a line without its end.
  template <typename T>
  absl::StatusOr<T> Read() {
    if (!InRange(at_, sizeof(T), size_)) return Bad("truncated");
    T value;
    std::memcpy(&value, data_ + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }
  absl::StatusOr<std::string> ReadBytes(uint64_t count);
  absl::StatusOr<std::string> ReadLine();
  uint64_t at() const { return at_; }
  uint64_t size() const { return size_; }

  // Stack. Top and Pop do not reach below the last mark.
  absl::Status Push(ValueId id);
  absl::Status PushNew(Value value);  // may move all values: take no reference across it
  absl::Status PushInt(int64_t integer) { return PushNew({.kind = Kind::kInt, .integer = integer}); }
  absl::StatusOr<ValueId> Top();
  absl::StatusOr<ValueId> Pop();
  absl::Status Mark();
  absl::StatusOr<std::vector<ValueId>> PopToMark();
  bool EndsWithOneValue() const { return marks_.empty() && stack_.size() == 1; }
  const Value& value(ValueId id) const { return values_[id]; }
  Value& value(ValueId id) { return values_[id]; }

  // Memo.
  absl::Status Put(uint32_t slot);
  absl::Status Get(uint32_t slot);

 private:
  const uint8_t* const data_;  // the caller's
  const uint64_t size_;
  uint64_t at_ = 0;
  std::vector<Value> values_;
  std::vector<ValueId> stack_;
  std::vector<size_t> marks_;  // stack heights
  std::unordered_map<uint32_t, ValueId> memo_;
};

}  // namespace minitron::engine::pickle
