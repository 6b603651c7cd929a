#include "engine/checkpoint/pickle_machine.h"

#include <algorithm>

#include "engine/base/status_macros.h"

namespace minitron::engine::pickle {

const char* KindName(Kind kind) {
  constexpr const char* kNames[] = {"None", "bool",  "int",      "float", "string",  "tuple", "list",
                                    "dict", "class", "function", "class", "storage", "tensor"};
  return kNames[static_cast<int>(kind)];
}

absl::StatusOr<std::string> PickleMachine::ReadBytes(uint64_t count) {
  if (count > kMaxStringBytes) return Bad(absl::StrCat("string of ", count, " bytes, limit ", kMaxStringBytes));
  if (!InRange(at_, count, size_)) return Bad("truncated");
  std::string bytes(reinterpret_cast<const char*>(data_) + at_, count);
  at_ += count;
  return bytes;
}

absl::StatusOr<std::string> PickleMachine::ReadLine() {
  const uint64_t limit = std::min<uint64_t>(size_ - at_, kMaxStringBytes);
  const void* newline = limit == 0 ? nullptr : std::memchr(data_ + at_, '\n', limit);
  if (newline == nullptr) return Bad("global without an end of line");
  const uint64_t count = static_cast<const uint8_t*>(newline) - (data_ + at_);
  std::string line(reinterpret_cast<const char*>(data_) + at_, count);
  at_ += count + 1;
  return line;
}

absl::Status PickleMachine::Push(ValueId id) {
  if (stack_.size() >= kMaxStack) return Bad(absl::StrCat("stack over ", kMaxStack));
  stack_.push_back(id);
  return absl::OkStatus();
}

absl::Status PickleMachine::PushNew(Value value) {
  if (values_.size() >= kMaxValues) return Bad(absl::StrCat("over ", kMaxValues, " values"));
  values_.push_back(std::move(value));
  return Push(static_cast<ValueId>(values_.size() - 1));
}

absl::StatusOr<ValueId> PickleMachine::Top() {
  const size_t floor = marks_.empty() ? 0 : marks_.back();
  if (stack_.size() <= floor) return Bad("stack is empty");
  return stack_.back();
}

absl::StatusOr<ValueId> PickleMachine::Pop() {
  ASSIGN_OR_RETURN(const ValueId id, Top());
  stack_.pop_back();
  return id;
}

absl::StatusOr<std::vector<ValueId>> PickleMachine::PopToMark() {
  if (marks_.empty()) return Bad("no mark on the stack");
  std::vector<ValueId> items(stack_.begin() + static_cast<int64_t>(marks_.back()), stack_.end());
  stack_.resize(marks_.back());
  marks_.pop_back();
  return items;
}

absl::Status PickleMachine::Put(uint32_t slot) {
  ASSIGN_OR_RETURN(const ValueId id, Top());
  if (memo_.size() >= kMaxValues) return Bad(absl::StrCat("memo over ", kMaxValues));
  memo_[slot] = id;
  return absl::OkStatus();
}

absl::Status PickleMachine::Get(uint32_t slot) {
  const auto found = memo_.find(slot);
  if (found == memo_.end()) return Bad(absl::StrCat("memo slot ", slot, " is empty"));
  return Push(found->second);
}

absl::Status PickleMachine::Mark() {
  if (marks_.size() >= kMaxMarks) return Bad(absl::StrCat("nested deeper than ", kMaxMarks));
  marks_.push_back(stack_.size());
  return absl::OkStatus();
}

}  // namespace minitron::engine::pickle
