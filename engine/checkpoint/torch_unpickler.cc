// The restricted unpickler behind ParseTorchPickle. Opcodes: Python's Lib/pickletools.py, protocol 2.
#include <algorithm>
#include <iterator>
#include <optional>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint/checked_math.h"
#include "engine/checkpoint/pickle_machine.h"
#include "engine/checkpoint/torch_pickle.h"

namespace minitron::engine {
namespace {

using pickle::Kind;
using pickle::KindName;
using pickle::Value;
using pickle::ValueId;

class Unpickler : private pickle::PickleMachine {
 public:
  Unpickler(const uint8_t* data, int64_t size) : PickleMachine(data, size) {}

  absl::StatusOr<std::vector<PickledTensor>> Run();

 private:
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

  std::vector<PickledTensor> tensors_;
};

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
  if (value(list).kind != Kind::kList) return Bad(absl::StrCat("append to a ", KindName(value(list).kind)));
  std::vector<ValueId>& target = value(list).items;
  target.insert(target.end(), items.begin(), items.end());
  return absl::OkStatus();
}

absl::Status Unpickler::SetItems(std::vector<ValueId> items) {
  ASSIGN_OR_RETURN(const ValueId dict, Top());
  if (value(dict).kind != Kind::kDict) return Bad(absl::StrCat("items set on a ", KindName(value(dict).kind)));
  if (items.size() % 2 != 0) return Bad("a dict key without a value");
  std::vector<ValueId>& target = value(dict).items;
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
  const Value& tuple = value(id);
  constexpr Kind kKinds[] = {Kind::kString, Kind::kStorageClass, Kind::kString, Kind::kString, Kind::kInt};
  bool matches = tuple.kind == Kind::kTuple && tuple.items.size() == std::size(kKinds);
  for (size_t i = 0; matches && i < std::size(kKinds); ++i) matches = value(tuple.items[i]).kind == kKinds[i];
  if (!matches || value(tuple.items[0]).string != "storage") return Bad("persistent id is not a storage");
  const int64_t elements = value(tuple.items[4]).integer;
  if (elements < 0) return Bad(absl::StrCat("storage of ", elements, " elements"));
  const std::string key = value(tuple.items[2]).string;
  if (key.size() > pickle::kMaxStorageKeyBytes) {
    return Bad(absl::StrCat("storage key of ", key.size(), " bytes, limit ", pickle::kMaxStorageKeyBytes));
  }
  const DType dtype = value(tuple.items[1]).dtype;
  return PushNew({.kind = Kind::kStorage, .dtype = dtype, .integer = elements, .string = key});
}

absl::Status Unpickler::Reduce() {
  ASSIGN_OR_RETURN(const ValueId arguments, Pop());
  ASSIGN_OR_RETURN(const ValueId callee, Pop());
  if (value(arguments).kind != Kind::kTuple) return Bad("call without an argument tuple");
  switch (value(callee).kind) {
    case Kind::kOrderedDictClass:
      if (!value(arguments).items.empty()) return Bad("OrderedDict called with arguments");
      return PushNew({.kind = Kind::kDict});
    case Kind::kRebuildTensor:
      return RebuildTensor(value(arguments));
    default:
      return Bad(absl::StrCat("call of a ", KindName(value(callee).kind)));
  }
}

absl::StatusOr<std::vector<int64_t>> Unpickler::Sizes(ValueId id) const {
  const Value& tuple = value(id);
  if (tuple.kind != Kind::kTuple || static_cast<int64_t>(tuple.items.size()) > kMaxRank) {
    return Bad(absl::StrCat("tensor size or stride is not a tuple of up to ", kMaxRank));
  }
  std::vector<int64_t> sizes;
  for (const ValueId item : tuple.items) {
    if (value(item).kind != Kind::kInt || value(item).integer < 0) {
      return Bad("tensor size or stride is not a non-negative integer");
    }
    sizes.push_back(value(item).integer);
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
  const Value& storage = value(arguments.items[0]);
  const Value& offset = value(arguments.items[1]);
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
  if (value(state).kind != Kind::kDict || value(object).kind != Kind::kDict) {
    return Bad(absl::StrCat("attributes set on a ", KindName(value(object).kind)));
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
      return Mark();
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
  const Value& dict = value(root);
  if (dict.kind != Kind::kDict) return Bad(absl::StrCat("holds a ", KindName(dict.kind), ", not a state dict"));
  if (static_cast<int64_t>(dict.items.size() / 2) > kMaxTensors)
    return Bad(absl::StrCat("over ", kMaxTensors, " tensors"));
  std::vector<PickledTensor> named;
  std::unordered_set<std::string_view> names;  // so that one long string cannot name many tensors
  for (size_t i = 0; i < dict.items.size(); i += 2) {
    const Value& key = value(dict.items[i]);
    const Value& item = value(dict.items[i + 1]);
    if (key.kind != Kind::kString || !IsTensorName(key.string)) {
      return Bad("a key of the state dict is not a tensor name");
    }
    if (item.kind != Kind::kTensor) {
      return Bad(absl::StrCat("\"", key.string, "\" is a ", KindName(item.kind), ", not a tensor"));
    }
    if (!names.insert(key.string).second) return Bad(absl::StrCat("tensor \"", key.string, "\" is there twice"));
    named.push_back(tensors_[item.integer]);
    named.back().name = key.string;
  }
  return named;
}

absl::StatusOr<std::vector<PickledTensor>> Unpickler::Run() {
  if (size() > static_cast<uint64_t>(pickle::kMaxPickleBytes))
    return Bad(absl::StrCat(size(), " bytes, limit ", pickle::kMaxPickleBytes));
  ASSIGN_OR_RETURN(const uint16_t start, Read<uint16_t>());
  if (start != (uint16_t{pickle::kProtocol} << 8 | 0x80)) return Bad("not a pickle of protocol 2");
  while (true) {
    ASSIGN_OR_RETURN(const uint8_t opcode, Read<uint8_t>());
    if (opcode == '.') break;
    RETURN_IF_ERROR(Step(opcode));
  }
  if (at() != size()) return Bad("bytes after the end of the pickle");
  if (!EndsWithOneValue()) return Bad("does not end with one value");
  ASSIGN_OR_RETURN(const ValueId root, Top());
  return NamedTensors(root);
}

}  // namespace

absl::StatusOr<std::vector<PickledTensor>> ParseTorchPickle(const uint8_t* data, int64_t size) {
  return Unpickler(data, size).Run();
}

}  // namespace minitron::engine
