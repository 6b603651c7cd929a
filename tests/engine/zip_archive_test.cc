// zip_archive: the directory of stored zips, and each field that could lie, patched one at a time.
#include "engine/checkpoint/zip_archive.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/engine/model_files.h"

namespace minitron::engine {
namespace {

using ::testing::HasSubstr;
using testing::Raw;

// Two entries "a" and "b" of 12 bytes without zip64. Local records take 30 + 1 + 4 + 12, central ones 46 + 1 bytes.
constexpr size_t kLocalB = 47, kCentralA = 94, kCentralB = 141, kEnd = 188;

std::string TwoEntries() {
  return testing::StoredZip({{"a", std::string(12, 'x')}, {"b", std::string(12, 'y')}}, false);
}

absl::StatusOr<std::vector<ZipEntry>> Read(const std::string& bytes) {
  const std::vector<uint8_t> exact(bytes.begin(), bytes.end());
  return ReadStoredZip(exact.data(), static_cast<int64_t>(exact.size()), "f.zip");
}

void ExpectRefused(const std::string& bytes, const std::string& why) {
  const auto entries = Read(bytes);
  ASSERT_FALSE(entries.ok()) << "not refused: " << why;
  EXPECT_EQ(entries.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(entries.status().message()), HasSubstr(why));
}

std::string Patched(size_t at, const std::string& bytes, std::string zip = TwoEntries()) {
  return zip.replace(at, bytes.size(), bytes);
}

TEST(ZipArchive, ReadsEntriesSortedByName) {
  for (const bool zip64 : {false, true}) {
    const std::string zip = testing::StoredZip({{"b", "yy"}, {"a", "xxx"}}, zip64);
    const auto entries = Read(zip);
    ASSERT_TRUE(entries.ok()) << entries.status();
    ASSERT_EQ(entries->size(), 2u);
    EXPECT_EQ((*entries)[0].name, "a");
    EXPECT_EQ(zip.substr((*entries)[0].offset, (*entries)[0].num_bytes), "xxx");
    EXPECT_EQ(zip.substr((*entries)[1].offset, (*entries)[1].num_bytes), "yy");
  }
}

TEST(ZipArchive, CommentAtTheEndIsSkipped) {
  EXPECT_TRUE(Read(Patched(kEnd + 20, Raw<uint16_t>(5)) + "hello").ok());
  ExpectRefused(Patched(kEnd + 20, Raw<uint16_t>(4)) + "hello", "no zip end record");
}

TEST(ZipArchive, EntriesThatOverlapAreRefused) {
  const std::string size = Raw<uint32_t>(20);
  ExpectRefused(Patched(kCentralA + 20, size + size), "\"b\" overlaps another");
  ExpectRefused(Patched(kCentralB + 20, size + size), "overlaps the directory");
  // Both records name the first local header.
  ExpectRefused(Patched(kCentralB + 46, "a", Patched(kCentralB + 42, Raw<uint32_t>(0))), "overlaps another");
}

TEST(ZipArchive, SizesThatDisagreeOrReachOutsideAreRefused) {
  ExpectRefused(Patched(kCentralA + 20, Raw<uint32_t>(11)), "stores 11 bytes of 12");
  const std::string huge = Raw<uint32_t>(0xFFFFFFFE);
  ExpectRefused(Patched(kCentralB + 20, huge + huge), "is cut off");
  ExpectRefused(Patched(kCentralA + 24, Raw<uint32_t>(0xFFFFFFFF)), "zip64 extra field missing");
}

TEST(ZipArchive, LocalHeadersMustMatch) {
  ExpectRefused(Patched(kLocalB + 30, "c"), "another name in its local header");
  ExpectRefused(Patched(kLocalB + 26, Raw<uint16_t>(2)), "another name in its local header");
  ExpectRefused(Patched(kLocalB, "XX"), "no local header at 47");
  ExpectRefused(Patched(kCentralB + 42, Raw<uint32_t>(48)), "no local header at 48");
  ExpectRefused(Patched(kCentralB + 42, Raw<uint32_t>(0xFFFFFFF0)), "no local header");
  ExpectRefused(Patched(kLocalB + 28, Raw<uint16_t>(0xFFFF)), "another name in its local header");
}

TEST(ZipArchive, EncryptedCompressedAndSplitArchivesAreRefused) {
  ExpectRefused(Patched(kCentralA + 8, Raw<uint16_t>(9)), "is encrypted");
  ExpectRefused(Patched(kCentralA + 10, Raw<uint16_t>(8)), "compression method 8");
  ExpectRefused(Patched(kEnd + 4, Raw<uint16_t>(1)), "more than one disk");
}

TEST(ZipArchive, DirectoryMustFillItsRange) {
  ExpectRefused(Patched(kEnd + 10, Raw<uint16_t>(1)), "after the last zip directory record");
  ExpectRefused(Patched(kEnd + 10, Raw<uint16_t>(3)), "zip of 3 entries in 94 bytes");
  ExpectRefused(Patched(kEnd + 10, Raw<uint16_t>(9)), "zip of 9 entries");
  ExpectRefused(Patched(kEnd + 12, Raw<uint32_t>(95)), "does not end at");
  ExpectRefused(Patched(kEnd + 16, Raw<uint32_t>(0xFFFFFFFF)), "does not end at");
  ExpectRefused(Patched(kCentralA, "XX"), "no zip directory record at 94");
  ExpectRefused(Patched(kCentralA + 28, Raw<uint16_t>(0xFFFF)), "is cut off");
}

TEST(ZipArchive, Zip64RecordsMustBeThere) {
  const std::string zip = testing::StoredZip({{"a", "xxx"}}, true);
  const size_t locator = zip.size() - 22 - 20, end64 = locator - 56;
  ExpectRefused(Patched(locator + 8, Raw<uint64_t>(~uint64_t{0}), zip), "zip64 end record");
  ExpectRefused(Patched(locator + 8, Raw<uint64_t>(end64 - 1), zip), "zip64 end record");
  ExpectRefused(Patched(end64 + 32, Raw<uint64_t>(~uint64_t{0}), zip), "limit 200000");
  ExpectRefused(Patched(end64 + 40, Raw<uint64_t>(~uint64_t{0}), zip), "does not end at");
  ExpectRefused(Patched(end64 + 48, Raw<uint64_t>(~uint64_t{0} - 10), zip), "does not end at");
}

}  // namespace
}  // namespace minitron::engine
