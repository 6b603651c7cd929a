// Planted: in no target, and skipped.
void Planted() { GTEST_SKIP(); }
