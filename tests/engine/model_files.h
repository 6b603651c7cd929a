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
#include <utility>
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
  int64_t hole_bytes = 0;  // more content, of zeros, that no piece holds
};

// A zip of stored files as (offset, bytes) pieces in ascending order. With `zip64`, sizes and offsets are in the extra
// fields and the zip64 end record, as torch.save writes large files.
inline std::vector<std::pair<uint64_t, std::string>> StoredZipPieces(const std::vector<ZipFile>& files, bool zip64,
                                                                     uint16_t method) {
  std::vector<std::pair<uint64_t, std::string>> pieces;
  std::string directory;
  uint64_t at = 0;
  const auto short_field = [zip64](uint64_t value) { return Raw<uint32_t>(zip64 ? 0xFFFFFFFF : value); };
  for (const ZipFile& file : files) {
    const uint64_t header = at, bytes = file.content.size() + file.hole_bytes;
    const std::string common = Raw<uint16_t>(8) + Raw<uint16_t>(method) + std::string(8, '\0') + short_field(bytes) +
                               short_field(bytes) + Raw<uint16_t>(file.name.size());
    const std::string extra =
        zip64 ? Raw<uint16_t>(1) + Raw<uint16_t>(24) + Raw(bytes) + Raw(bytes) + Raw(header) : std::string();
    pieces.emplace_back(at, Raw<uint32_t>(0x04034b50) + Raw<uint16_t>(0) + common + Raw<uint16_t>(4) + file.name +
                                "FB" + Raw<uint16_t>(0) + file.content);
    directory += Raw<uint32_t>(0x02014b50) + Raw<uint32_t>(0) + common + Raw<uint16_t>(extra.size()) +
                 std::string(10, '\0') + short_field(header) + file.name + extra;
    at += pieces.back().second.size() + file.hole_bytes;
  }
  const uint64_t count = files.size(), bytes = directory.size(), end = at + bytes;
  std::string tail = directory;
  if (zip64) {
    tail += Raw<uint32_t>(0x06064b50) + Raw<uint64_t>(44) + Raw<uint32_t>(0) + Raw<uint64_t>(0) + Raw(count) +
            Raw(count) + Raw(bytes) + Raw(at);
    tail += Raw<uint32_t>(0x07064b50) + Raw<uint32_t>(0) + Raw(end) + Raw<uint32_t>(1);
  }
  tail += Raw<uint32_t>(0x06054b50) + Raw<uint32_t>(0) + Raw<uint16_t>(zip64 ? 0xFFFF : count) +
          Raw<uint16_t>(zip64 ? 0xFFFF : count) + short_field(bytes) + short_field(at) + Raw<uint16_t>(0);
  pieces.emplace_back(at, tail);
  return pieces;
}

// The same as one string. Requires no holes.
inline std::string StoredZip(const std::vector<ZipFile>& files, bool zip64 = true, uint16_t method = 0) {
  std::string zip;
  for (const auto& [offset, bytes] : StoredZipPieces(files, zip64, method)) {
    CHECK(offset == zip.size());
    zip += bytes;
  }
  return zip;
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
