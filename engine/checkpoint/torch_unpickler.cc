// The restricted unpickler behind ParseTorchPickle. Opcodes: Python's Lib/pickletools.py, protocol 2.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <optional>
#include <unordered_map>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/checked_math.h"
#include "engine/checkpoint/torch_pickle.h"

namespace minitron::engine {
namespace {

// Bounds, far above what a checkpoint of kMaxTensors needs (about 20 values a tensor) and small against memory.
constexpr int64_t kMaxPickleBytes = 64 << 20;
constexpr size_t kMaxValues = 2'000'000;
constexpr size_t kMaxStack = 100'000;
constexpr size_t kMaxMarks = 64;
constexpr uint64_t kMaxStringBytes = kMaxTensorNameBytes;
constexpr uint8_t kProtocol = 2;

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

const char* KindName(Kind kind) {
  constexpr const char* kNames[] = {"None", "bool",  "int",      "float", "string",  "tuple", "list",
                                    "dict", "class", "function", "class", "storage", "tensor"};
  return kNames[static_cast<int>(kind)];
}

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

class Unpickler {
 public:
  Unpickler(const uint8_t* data, int64_t size) : data_(data), size_(static_cast<uint64_t>(size)) {}

  absl::StatusOr<std::vector<PickledTensor>> Run();

 private:
  absl::Status Bad(const std::string& what) const {
    return absl::InvalidArgumentError(absl::StrCat("data.pkl, byte ", at_, ": ", what));
  }

  // Input.
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

  // Stack and memo.
  absl::Status Push(ValueId id);
  absl::Status PushNew(Value value);
  absl::Status PushInt(int64_t integer) { return PushNew({.kind = Kind::kInt, .integer = integer}); }
  absl::StatusOr<ValueId> Pop();
  absl::StatusOr<std::vector<ValueId>> PopToMark();
  absl::StatusOr<ValueId> Top();
  absl::Status Put(uint32_t slot);
  absl::Status Get(uint32_t slot);

  // Opcodes.
  absl::Status Step(uint8_t opcode);
  absl::Status Constant(uint8_t opcode);
  absl::Status PushString();
  absl::Status PushLong1();
  absl::Status Tuple(std::vector<ValueId> items) { return PushNew({.kind = Kind::kTuple, .items = std::move(items)}); }
  absl::Status SmallTuple(int count);
  absl::Status Append(std::vector<ValueId> items);
  absl::Status SetItems(std::vector<ValueId> items);
  absl::Status Global();
  absl::Status PersistentId();
  absl::Status Reduce();
  absl::Status RebuildTensor(const Value& arguments);
  absl::Status Build();

  absl::StatusOr<std::vector<int64_t>> Sizes(ValueId id) const;
  absl::StatusOr<std::vector<PickledTensor>> NamedTensors(ValueId root) const;

  const uint8_t* const data_;  // the caller's
  const uint64_t size_;
  uint64_t at_ = 0;
  std::vector<Value> values_;
  std::vector<ValueId> stack_;
  std::vector<size_t> marks_;  // stack heights
  std::unordered_map<uint32_t, ValueId> memo_;
  std::vector<PickledTensor> tensors_;
};

absl::StatusOr<std::string> Unpickler::ReadBytes(uint64_t count) {
  if (count > kMaxStringBytes) return Bad(absl::StrCat("string of ", count, " bytes, limit ", kMaxStringBytes));
  if (!InRange(at_, count, size_)) return Bad("truncated");
  std::string bytes(reinterpret_cast<const char*>(data_) + at_, count);
  at_ += count;
  return bytes;
}

absl::StatusOr<std::string> Unpickler::ReadLine() {
  const uint64_t limit = std::min<uint64_t>(size_ - at_, kMaxStringBytes);
  const void* newline = limit == 0 ? nullptr : std::memchr(data_ + at_, '\n', limit);
  if (newline == nullptr) return Bad("global without an end of line");
  const uint64_t count = static_cast<const uint8_t*>(newline) - (data_ + at_);
  std::string line(reinterpret_cast<const char*>(data_) + at_, count);
  at_ += count + 1;
  return line;
}

absl::Status Unpickler::Push(ValueId id) {
  if (stack_.size() >= kMaxStack) return Bad(absl::StrCat("stack over ", kMaxStack));
  stack_.push_back(id);
  return absl::OkStatus();
}

absl::Status Unpickler::PushNew(Value value) {
  if (values_.size() >= kMaxValues) return Bad(absl::StrCat("over ", kMaxValues, " values"));
  values_.push_back(std::move(value));
  return Push(static_cast<ValueId>(values_.size() - 1));
}

absl::StatusOr<ValueId> Unpickler::Top() {
  const size_t floor = marks_.empty() ? 0 : marks_.back();
  if (stack_.size() <= floor) return Bad("stack is empty");
  return stack_.back();
}

absl::StatusOr<ValueId> Unpickler::Pop() {
  ASSIGN_OR_RETURN(const ValueId id, Top());
  stack_.pop_back();
  return id;
}

absl::StatusOr<std::vector<ValueId>> Unpickler::PopToMark() {
  if (marks_.empty()) return Bad("no mark on the stack");
  std::vector<ValueId> items(stack_.begin() + static_cast<int64_t>(marks_.back()), stack_.end());
  stack_.resize(marks_.back());
  marks_.pop_back();
  return items;
}

absl::Status Unpickler::Put(uint32_t slot) {
  ASSIGN_OR_RETURN(const ValueId id, Top());
  if (memo_.size() >= kMaxValues) return Bad(absl::StrCat("memo over ", kMaxValues));
  memo_[slot] = id;
  return absl::OkStatus();
}

absl::Status Unpickler::Get(uint32_t slot) {
  const auto found = memo_.find(slot);
  if (found == memo_.end()) return Bad(absl::StrCat("memo slot ", slot, " is empty"));
  return Push(found->second);
}

absl::Status Unpickler::PushString() {
  ASSIGN_OR_RETURN(const uint32_t count, Read<uint32_t>());
  ASSIGN_OR_RETURN(std::string text, ReadBytes(count));
  return PushNew({.kind = Kind::kString, .string = std::move(text)});
}

// LONG1: little-endian two's complement of a length given in one byte; torch writes it for sizes from 2^31.
absl::Status Unpickler::PushLong1() {
  ASSIGN_OR_RETURN(const uint8_t count, Read<uint8_t>());
  if (count > 8) return Bad(absl::StrCat("integer of ", count, " bytes, limit 8"));
  ASSIGN_OR_RETURN(const std::string bytes, ReadBytes(count));
  uint64_t value = 0;
  for (int i = 0; i < count; ++i) value |= uint64_t{static_cast<uint8_t>(bytes[i])} << (8 * i);
  const bool negative = count > 0 && (static_cast<uint8_t>(bytes[count - 1]) & 0x80) != 0;
  if (negative && count < 8) value |= ~uint64_t{0} << (8 * count);
  return PushInt(static_cast<int64_t>(value));
}

absl::Status Unpickler::SmallTuple(int count) {
  std::vector<ValueId> items(count);
  for (int i = count - 1; i >= 0; --i) {
    ASSIGN_OR_RETURN(items[i], Pop());
  }
  return Tuple(std::move(items));
}

absl::Status Unpickler::Append(std::vector<ValueId> items) {
  ASSIGN_OR_RETURN(const ValueId list, Top());
  if (values_[list].kind != Kind::kList) return Bad(absl::StrCat("append to a ", KindName(values_[list].kind)));
  std::vector<ValueId>& target = values_[list].items;
  target.insert(target.end(), items.begin(), items.end());
  return absl::OkStatus();
}

absl::Status Unpickler::SetItems(std::vector<ValueId> items) {
  ASSIGN_OR_RETURN(const ValueId dict, Top());
  if (values_[dict].kind != Kind::kDict) return Bad(absl::StrCat("items set on a ", KindName(values_[dict].kind)));
  if (items.size() % 2 != 0) return Bad("a dict key without a value");
  std::vector<ValueId>& target = values_[dict].items;
  target.insert(target.end(), items.begin(), items.end());
  return absl::OkStatus();
}

absl::Status Unpickler::Global() {
  ASSIGN_OR_RETURN(const std::string module, ReadLine());
  ASSIGN_OR_RETURN(const std::string name, ReadLine());
  if (module == "collections" && name == "OrderedDict") return PushNew({.kind = Kind::kOrderedDictClass});
  if (module == "torch._utils" && name == "_rebuild_tensor_v2") return PushNew({.kind = Kind::kRebuildTensor});
  if (module == "torch" && name == "BFloat16Storage") {
    return PushNew({.kind = Kind::kStorageClass, .dtype = DType::kBf16});
  }
  if (module == "torch" && name == "HalfStorage") return PushNew({.kind = Kind::kStorageClass, .dtype = DType::kF16});
  if (module == "torch" && name == "FloatStorage") return PushNew({.kind = Kind::kStorageClass, .dtype = DType::kF32});
  return Bad(absl::StrCat("global \"", module, ".", name, "\" refused; allowed: collections.OrderedDict, ",
                          "torch._utils._rebuild_tensor_v2, torch.{BFloat16,Half,Float}Storage"));
}

// ('storage', storage class, key, device, elements)
absl::Status Unpickler::PersistentId() {
  ASSIGN_OR_RETURN(const ValueId id, Pop());
  const Value& tuple = values_[id];
  constexpr Kind kKinds[] = {Kind::kString, Kind::kStorageClass, Kind::kString, Kind::kString, Kind::kInt};
  bool matches = tuple.kind == Kind::kTuple && tuple.items.size() == std::size(kKinds);
  for (size_t i = 0; matches && i < std::size(kKinds); ++i) matches = values_[tuple.items[i]].kind == kKinds[i];
  if (!matches || values_[tuple.items[0]].string != "storage") return Bad("persistent id is not a storage");
  const int64_t elements = values_[tuple.items[4]].integer;
  if (elements < 0) return Bad(absl::StrCat("storage of ", elements, " elements"));
  const std::string key = values_[tuple.items[2]].string;
  const DType dtype = values_[tuple.items[1]].dtype;
  return PushNew({.kind = Kind::kStorage, .dtype = dtype, .integer = elements, .string = key});
}

absl::Status Unpickler::Reduce() {
  ASSIGN_OR_RETURN(const ValueId arguments, Pop());
  ASSIGN_OR_RETURN(const ValueId callee, Pop());
  if (values_[arguments].kind != Kind::kTuple) return Bad("call without an argument tuple");
  switch (values_[callee].kind) {
    case Kind::kOrderedDictClass:
      if (!values_[arguments].items.empty()) return Bad("OrderedDict called with arguments");
      return PushNew({.kind = Kind::kDict});
    case Kind::kRebuildTensor:
      return RebuildTensor(values_[arguments]);
    default:
      return Bad(absl::StrCat("call of a ", KindName(values_[callee].kind)));
  }
}

absl::StatusOr<std::vector<int64_t>> Unpickler::Sizes(ValueId id) const {
  const Value& tuple = values_[id];
  if (tuple.kind != Kind::kTuple || static_cast<int64_t>(tuple.items.size()) > kMaxRank) {
    return Bad(absl::StrCat("tensor size or stride is not a tuple of up to ", kMaxRank));
  }
  std::vector<int64_t> sizes;
  for (const ValueId item : tuple.items) {
    if (values_[item].kind != Kind::kInt || values_[item].integer < 0) {
      return Bad("tensor size or stride is not a non-negative integer");
    }
    sizes.push_back(values_[item].integer);
  }
  return sizes;
}

// Whether `stride` is that of a row-major array; of a dim of size 1, or of an empty array, it does not matter.
bool IsContiguous(const std::vector<int64_t>& shape, const std::vector<int64_t>& stride) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return true;
  int64_t expected = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    if (shape[i] != 1 && stride[i] != expected) return false;
    expected *= shape[i];  // no overflow: the caller has checked the product
  }
  return true;
}

// (storage, offset, size, stride, requires_grad, backward_hooks): the last two mean nothing for inference.
absl::Status Unpickler::RebuildTensor(const Value& arguments) {
  if (arguments.items.size() != 6) return Bad(absl::StrCat("tensor of ", arguments.items.size(), " arguments, not 6"));
  const Value& storage = values_[arguments.items[0]];
  const Value& offset = values_[arguments.items[1]];
  if (storage.kind != Kind::kStorage) return Bad("tensor without a storage");
  if (offset.kind != Kind::kInt || offset.integer < 0) return Bad("tensor offset is not a non-negative integer");
  ASSIGN_OR_RETURN(std::vector<int64_t> shape, Sizes(arguments.items[2]));
  ASSIGN_OR_RETURN(const std::vector<int64_t> stride, Sizes(arguments.items[3]));
  const std::optional<int64_t> count = CheckedProduct(shape);
  if (!count || stride.size() != shape.size())
    return Bad("tensor size overflows 63 bits or has another rank than its stride");
  if (!IsContiguous(shape, stride)) return Bad("tensor is not contiguous");
  if (!InRange(offset.integer, *count, storage.integer)) {
    return Bad(absl::StrCat("tensor [", offset.integer, " + ", *count, "] outside its storage of ", storage.integer,
                            " elements"));
  }
  if (static_cast<int64_t>(tensors_.size()) >= kMaxTensors) return Bad(absl::StrCat("over ", kMaxTensors, " tensors"));
  tensors_.push_back({"", storage.string, storage.dtype, storage.integer, offset.integer, std::move(shape)});
  return PushNew({.kind = Kind::kTensor, .integer = static_cast<int64_t>(tensors_.size()) - 1});
}

// The attributes of an OrderedDict; a state_dict carries its _metadata (module versions) there. Dropped.
absl::Status Unpickler::Build() {
  ASSIGN_OR_RETURN(const ValueId state, Pop());
  ASSIGN_OR_RETURN(const ValueId object, Top());
  if (values_[state].kind != Kind::kDict || values_[object].kind != Kind::kDict) {
    return Bad(absl::StrCat("attributes set on a ", KindName(values_[object].kind)));
  }
  return absl::OkStatus();
}

absl::Status Unpickler::Constant(uint8_t opcode) {
  switch (opcode) {
    case 'N':
      return PushNew({.kind = Kind::kNone});
    case 0x88:  // NEWTRUE
    case 0x89:  // NEWFALSE
      return PushNew({.kind = Kind::kBool, .integer = opcode == 0x88});
    case 'J': {  // BININT
      ASSIGN_OR_RETURN(const int32_t value, Read<int32_t>());
      return PushInt(value);
    }
    case 'K': {  // BININT1
      ASSIGN_OR_RETURN(const uint8_t value, Read<uint8_t>());
      return PushInt(value);
    }
    case 'M': {  // BININT2
      ASSIGN_OR_RETURN(const uint16_t value, Read<uint16_t>());
      return PushInt(value);
    }
    case 0x8a:
      return PushLong1();
    case 'G': {  // BINFLOAT: only metadata has floats; the value is dropped
      RETURN_IF_ERROR(Read<uint64_t>().status());
      return PushNew({.kind = Kind::kFloat});
    }
    case 'X':
      return PushString();
    default:
      return Bad(absl::StrCat("opcode 0x", absl::Hex(opcode, absl::kZeroPad2), " refused"));
  }
}

absl::Status Unpickler::Step(uint8_t opcode) {
  switch (opcode) {
    case '(':  // MARK
      if (marks_.size() >= kMaxMarks) return Bad(absl::StrCat("nested deeper than ", kMaxMarks));
      marks_.push_back(stack_.size());
      return absl::OkStatus();
    case ')':
      return Tuple({});
    case 0x85:  // TUPLE1
    case 0x86:
    case 0x87:
      return SmallTuple(opcode - 0x84);
    case 't': {
      ASSIGN_OR_RETURN(std::vector<ValueId> items, PopToMark());
      return Tuple(std::move(items));
    }
    case ']':
      return PushNew({.kind = Kind::kList});
    case '}':
      return PushNew({.kind = Kind::kDict});
    case 'a': {  // APPEND
      ASSIGN_OR_RETURN(const ValueId item, Pop());
      return Append({item});
    }
    case 'e': {  // APPENDS
      ASSIGN_OR_RETURN(std::vector<ValueId> items, PopToMark());
      return Append(std::move(items));
    }
    case 's': {  // SETITEM
      ASSIGN_OR_RETURN(const ValueId value, Pop());
      ASSIGN_OR_RETURN(const ValueId key, Pop());
      return SetItems({key, value});
    }
    case 'u': {  // SETITEMS
      ASSIGN_OR_RETURN(std::vector<ValueId> items, PopToMark());
      return SetItems(std::move(items));
    }
    case 'q':    // BINPUT
    case 'h': {  // BINGET
      ASSIGN_OR_RETURN(const uint8_t slot, Read<uint8_t>());
      return opcode == 'q' ? Put(slot) : Get(slot);
    }
    case 'r':    // LONG_BINPUT
    case 'j': {  // LONG_BINGET
      ASSIGN_OR_RETURN(const uint32_t slot, Read<uint32_t>());
      return opcode == 'r' ? Put(slot) : Get(slot);
    }
    case 'c':
      return Global();
    case 'Q':  // BINPERSID
      return PersistentId();
    case 'R':
      return Reduce();
    case 'b':
      return Build();
    default:
      return Constant(opcode);
  }
}

absl::StatusOr<std::vector<PickledTensor>> Unpickler::NamedTensors(ValueId root) const {
  const Value& dict = values_[root];
  if (dict.kind != Kind::kDict) return Bad(absl::StrCat("holds a ", KindName(dict.kind), ", not a state dict"));
  if (static_cast<int64_t>(dict.items.size() / 2) > kMaxTensors)
    return Bad(absl::StrCat("over ", kMaxTensors, " tensors"));
  std::vector<PickledTensor> named;
  named.reserve(dict.items.size() / 2);
  for (size_t i = 0; i < dict.items.size(); i += 2) {
    const Value& key = values_[dict.items[i]];
    const Value& value = values_[dict.items[i + 1]];
    if (key.kind != Kind::kString || !IsTensorName(key.string))
      return Bad("a key of the state dict is not a tensor name");
    if (value.kind != Kind::kTensor) {
      return Bad(absl::StrCat("\"", key.string, "\" is a ", KindName(value.kind), ", not a tensor"));
    }
    named.push_back(tensors_[value.integer]);
    named.back().name = key.string;
  }
  return named;
}

absl::StatusOr<std::vector<PickledTensor>> Unpickler::Run() {
  if (size_ > static_cast<uint64_t>(kMaxPickleBytes))
    return Bad(absl::StrCat(size_, " bytes, limit ", kMaxPickleBytes));
  ASSIGN_OR_RETURN(const uint16_t start, Read<uint16_t>());
  if (start != (uint16_t{kProtocol} << 8 | 0x80)) return Bad("not a pickle of protocol 2");
  while (true) {
    ASSIGN_OR_RETURN(const uint8_t opcode, Read<uint8_t>());
    if (opcode == '.') break;
    RETURN_IF_ERROR(Step(opcode));
  }
  if (at_ != size_) return Bad("bytes after the end of the pickle");
  if (!marks_.empty() || stack_.size() != 1) return Bad("does not end with one value");
  return NamedTensors(stack_[0]);
}

}  // namespace

absl::StatusOr<std::vector<PickledTensor>> ParseTorchPickle(const uint8_t* data, int64_t size) {
  return Unpickler(data, size).Run();
}

}  // namespace minitron::engine
