// Writers of small model files for the loader tests: folders, safetensors, torch zips and pickles, well-formed unless
// a test asks otherwise.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "engine/base/check.h"

namespace minitron::engine::testing {

// A folder that is removed with everything in it.
class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "minitron_test_XXXXXX").string();
    CHECK(mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }
  std::string File(const std::string& name) const { return path_ + "/" + name; }
  void Write(const std::string& name, const std::string& content) const {
    std::ofstream(File(name), std::ios::binary) << content;
  }

 private:
  std::string path_;
};

inline std::string ReadFile(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  CHECK(stream.good());
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

// `value` as little-endian bytes.
template <typename T>
std::string Raw(T value) {
  std::string bytes(sizeof(T), '\0');
  std::memcpy(bytes.data(), &value, sizeof(T));
  return bytes;
}

// A safetensors file: the length and text of the header as given, then the data.
inline std::string Safetensors(const std::string& header, const std::string& data) {
  return Raw<uint64_t>(header.size()) + header + data;
}

struct ZipFile {
  std::string name, content;
};

// A zip of stored files. With `zip64`, sizes and offsets are in the extra fields, as torch.save writes them.
inline std::string StoredZip(const std::vector<ZipFile>& files, bool zip64 = true, uint16_t method = 0) {
  std::string zip, directory;
  for (const ZipFile& file : files) {
    const uint64_t header = zip.size(), bytes = file.content.size();
    const std::string name_length = Raw<uint16_t>(file.name.size());
    zip += Raw<uint32_t>(0x04034b50) + Raw<uint16_t>(0) + Raw<uint16_t>(8) + Raw<uint16_t>(method) +
           std::string(8, '\0') + Raw<uint32_t>(bytes) + Raw<uint32_t>(bytes) + name_length + Raw<uint16_t>(4) +
           file.name + "FB" + Raw<uint16_t>(0) + file.content;
    const uint32_t in_extra = 0xFFFFFFFF;
    const std::string extra =
        zip64 ? Raw<uint16_t>(1) + Raw<uint16_t>(24) + Raw(bytes) + Raw(bytes) + Raw(header) : std::string();
    directory += Raw<uint32_t>(0x02014b50) + Raw<uint32_t>(0) + Raw<uint16_t>(8) + Raw<uint16_t>(method) +
                 std::string(8, '\0') + Raw<uint32_t>(zip64 ? in_extra : bytes) +
                 Raw<uint32_t>(zip64 ? in_extra : bytes) + name_length + Raw<uint16_t>(extra.size()) +
                 std::string(10, '\0') + Raw<uint32_t>(zip64 ? in_extra : header) + file.name + extra;
  }
  const uint64_t begin = zip.size(), count = files.size(), bytes = directory.size();
  zip += directory;
  if (zip64) {
    const uint64_t end = zip.size();
    zip += Raw<uint32_t>(0x06064b50) + Raw<uint64_t>(44) + Raw<uint32_t>(0) + Raw<uint64_t>(0) + Raw(count) +
           Raw(count) + Raw(bytes) + Raw(begin);
    zip += Raw<uint32_t>(0x07064b50) + Raw<uint32_t>(0) + Raw(end) + Raw<uint32_t>(1);
  }
  return zip + Raw<uint32_t>(0x06054b50) + Raw<uint32_t>(0) + Raw<uint16_t>(zip64 ? 0xFFFF : count) +
         Raw<uint16_t>(zip64 ? 0xFFFF : count) + Raw<uint32_t>(zip64 ? 0xFFFFFFFF : bytes) +
         Raw<uint32_t>(zip64 ? 0xFFFFFFFF : begin) + Raw<uint16_t>(0);
}

// Pieces of a protocol 2 pickle.
inline std::string PickleString(const std::string& text) {
  return std::string("X").append(Raw<uint32_t>(text.size())).append(text);
}
inline std::string PickleGlobal(const std::string& module, const std::string& name) {
  return "c" + module + "\n" + name + "\n";
}
// LONG1 of eight bytes.
inline std::string PickleInt(int64_t value) { return std::string("\x8a\x08").append(Raw(value)); }
inline std::string PickleTuple(const std::vector<int64_t>& values) {
  std::string text = "(";
  for (const int64_t value : values) text += PickleInt(value);
  return text + "t";
}

struct PickleTensor {
  std::string name = "w";
  std::string storage = "BFloat16Storage";
  std::string key = "0";
  int64_t elements = 6, offset = 0;
  std::vector<int64_t> shape = {2, 3}, stride = {3, 1};
};

// The value of one tensor.
inline std::string PickledTensorText(const PickleTensor& tensor) {
  const std::string persistent_id = std::string("(") + PickleString("storage") + PickleGlobal("torch", tensor.storage) +
                                    PickleString(tensor.key) + PickleString("cpu") + PickleInt(tensor.elements) + "tQ";
  return PickleGlobal("torch._utils", "_rebuild_tensor_v2") + "(" + persistent_id + PickleInt(tensor.offset) +
         PickleTuple(tensor.shape) + PickleTuple(tensor.stride) + "\x89" + PickleGlobal("collections", "OrderedDict") +
         ")RtR";
}

// A whole data.pkl with a plain dict of the tensors.
inline std::string StateDictPickle(const std::vector<PickleTensor>& tensors) {
  std::string pickle = "\x80\x02}(";
  for (const PickleTensor& tensor : tensors) pickle += PickleString(tensor.name) + PickledTensorText(tensor);
  return pickle + "u.";
}

}  // namespace minitron::engine::testing
