#include "server/auth.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace minitron::server {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// SHA-256 of "test".
constexpr char kTestDigest[] = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

std::string File(const std::string& digest = kTestDigest, const std::string& roles = R"(["user"])") {
  return R"({"tenants": {"alice": {"max_streams": 2, "max_queued": 3, "tokens_per_minute": 100}},
             "tokens": [{"id": "laptop", "sha256": ")" +
         digest + R"(", "tenant": "alice", "roles": )" + roles + "}]}";
}

std::string ErrorOf(const std::string& json) { return std::string(AuthTable::Parse(json).status().message()); }

TEST(AuthTableTest, KnownTokenGivesItsTenantRolesAndLimits) {
  const auto table = AuthTable::Parse(File());
  ASSERT_TRUE(table.ok()) << table.status();
  const Identity* identity = (*table)->FindToken("test");
  ASSERT_NE(identity, nullptr);
  EXPECT_EQ(identity->token_id, "laptop");
  EXPECT_EQ(identity->tenant, "alice");
  EXPECT_TRUE(identity->Has(Role::kUser));
  EXPECT_FALSE(identity->Has(Role::kAdmin));
  EXPECT_EQ((*table)->LimitsOf("alice").max_streams, 2);
  EXPECT_EQ((*table)->LimitsOf("alice").tokens_per_minute, 100);
  EXPECT_EQ((*table)->LimitsOf("bob").max_streams, 0);
}

TEST(AuthTableTest, AnythingButTheTokenIsUnknown) {
  const auto table = AuthTable::Parse(File());
  ASSERT_TRUE(table.ok());
  for (const std::string& token : {std::string(), std::string("tes"), std::string("test\0", 5), std::string("Test"),
                                   std::string(kTestDigest), std::string(100000, 'x')}) {
    EXPECT_EQ((*table)->FindToken(token), nullptr);
  }
  EXPECT_EQ((*table)->FindName("laptop"), nullptr);
}

TEST(AuthTableTest, CertificateNamesAreIdentitiesToo) {
  const auto table = AuthTable::Parse(
      R"({"tokens": [{"id": "ops", "client_san": "ops.example", "tenant": "t", "roles": ["admin"]}]})");
  ASSERT_TRUE(table.ok()) << table.status();
  ASSERT_NE((*table)->FindName("ops.example"), nullptr);
  EXPECT_TRUE((*table)->FindName("ops.example")->Has(Role::kAdmin));
  EXPECT_EQ((*table)->FindToken("ops.example"), nullptr);
}

TEST(AuthTableTest, ErrorsNameEntryKeyAndProblem) {
  EXPECT_EQ(ErrorOf("[]"), "file: not a JSON object");
  EXPECT_EQ(ErrorOf("{}"), "tokens: not a list with at least one entry");
  EXPECT_EQ(ErrorOf(R"({"token": []})"), "token: unknown key; known are tenants, tokens");
  EXPECT_EQ(ErrorOf(File(kTestDigest, R"(["root"])")), "tokens[0].roles: \"root\" is not one of user, admin");
  EXPECT_EQ(ErrorOf(File(kTestDigest, "[]")), "tokens[0]: has no roles");
  EXPECT_EQ(ErrorOf(R"({"tokens": [{"id": "a", "tenant": "t", "roles": ["user"]}]})"),
            "tokens[0]: needs either sha256 or client_san");
  EXPECT_THAT(ErrorOf(R"({"tenants": {"a": {"max_streams": 0}}, "tokens": []})"),
              HasSubstr("tenants.a.max_streams: 0 is not an integer in [1, "));
  EXPECT_THAT(ErrorOf(R"({"tenants": {"a": {"streams": 1}}, "tokens": []})"), HasSubstr("tenants.a.streams: unknown"));
}

TEST(AuthTableTest, ATokenInPlaceOfItsHashIsNotRepeated) {
  const std::string error = ErrorOf(File("my-secret-token"));
  EXPECT_EQ(error, "tokens[0].sha256: not 64 lower-case hex digits");
  EXPECT_THAT(error, Not(HasSubstr("secret")));
}

TEST(AuthTableTest, DuplicatesAreRefused) {
  const std::string entry =
      std::string(R"({"id": "a", "sha256": ")") + kTestDigest + R"(", "tenant": "t", "roles": ["user"]})";
  const std::string other =
      std::string(R"({"id": "b", "sha256": ")") + kTestDigest + R"(", "tenant": "t", "roles": ["user"]})";
  EXPECT_EQ(ErrorOf(R"({"tokens": [)" + entry + "," + entry + "]}"), "tokens[1]: its id appears twice");
  EXPECT_EQ(ErrorOf(R"({"tokens": [)" + entry + "," + other + "]}"), "tokens[1]: its sha256 appears twice");
}

TEST(AuthStoreTest, ReloadTakesANewFileAndKeepsTheOldOneWhenItIsBad) {
  const std::string path = ::testing::TempDir() + "/auth.json";
  const auto write = [&](const std::string& text) { std::ofstream(path, std::ios::trunc) << text; };
  write(File());
  auto store = AuthStore::Open(path);
  ASSERT_TRUE(store.ok()) << store.status();
  EXPECT_FALSE((*store)->Reload().value()) << "nothing changed";
  write(File(std::string(64, 'a')));
  EXPECT_TRUE((*store)->Reload().value());
  EXPECT_EQ((*store)->table()->FindToken("test"), nullptr) << "revoked";
  write("{broken");
  EXPECT_THAT(std::string((*store)->Reload().status().message()), HasSubstr(path));
  EXPECT_FALSE((*store)->Reload().ok()) << "still bad";
  EXPECT_NE((*store)->table(), nullptr);
  std::filesystem::remove(path);
  EXPECT_FALSE((*store)->Reload().ok());
  write(File());
  EXPECT_TRUE((*store)->Reload().value());
  EXPECT_NE((*store)->table()->FindToken("test"), nullptr);
  std::filesystem::remove(path);
}

TEST(BearerTokenTest, OnlyTheBearerSchemeIsRead) {
  EXPECT_EQ(BearerToken("Bearer abc"), "abc");
  EXPECT_EQ(BearerToken("bearer abc"), "abc");
  EXPECT_EQ(BearerToken("Basic abc"), "");
  EXPECT_EQ(BearerToken("Bearer"), "");
  EXPECT_EQ(BearerToken("abc"), "");
}

}  // namespace
}  // namespace minitron::server
