// A product of one warp group, done right or with one mistake: what the emulator has to notice.
#include <string>

#include "sm90_device.cuh"

namespace ha {
namespace {

constexpr int kSide = 64, kTile = kSide * 128, kShared = 3 * kTile + 64, kRounds = 16;
constexpr uint32_t kA = 0, kB = kTile, kLoaded = 2 * kTile, kCopied = kLoaded + 8, kWritten = kCopied + 8;
constexpr uint32_t kRead = kWritten + 8, kWord = kRead + 8;

// Small integers as bfloat16: sums are exact.
uint16_t number(int i, int j) { return uint16_t(float_bits(float((i * 7 + j * 3) % 11 - 5)) >> 16); }

struct Data {
  alignas(16) uint16_t a[kSide * kSide], b[kSide * kSide];
  float c[kSide * kSide];
};

// `times`: loads of the same.
void load(const Data& data, int first_row, int bytes, int times = 1) {
  const TileMap map{data.a, 1, kSide, kSide, kSide, kSide};
  barrier_expect(kLoaded, bytes);
  for (int i = 0; i < times; ++i) load_tile(map, kA, kLoaded, 0, first_row, 0);
  barrier_arrive(kLoaded);
}

// One thread writes a word again and again, all read it each time. Returns how often this thread reads another one.
int read_words(bool early) {
  int& word = *reinterpret_cast<int*>(shared_memory() + kWord);
  int wrong = 0;
  for (int i = 0; i < kRounds; ++i) {
    if (thread_index() == 0) {
      barrier_wait(kRead, i % 2 ^ 1);
      word = i;
      barrier_arrive(kWritten);
    }
    barrier_wait(kWritten, i % 2);
    if (early) barrier_arrive(kRead);
    wrong += word != i;
    if (!early) barrier_arrive(kRead);
  }
  return wrong;
}

void run(const std::string& mistake, Data& data) {
  const auto is = [&](const char* name) { return mistake == name; };
  const int thread = thread_index();
  if (thread == 0) {
    barrier_init(kLoaded, 1);
    barrier_init(kCopied, 128);
    barrier_init(kWritten, 1);
    barrier_init(kRead, 128);
    if (!is("barrier not published")) barrier_publish();
  }
  sync_block();
  const int misread = read_words(is("arrival before the read"));
  sync_block();
  if (is("end before a load has landed")) {
    if (thread == 0) load(data, 0, 8 * kTile, 8);
    return;
  }
  if (thread == 0) load(data, 0, is("fewer bytes expected") ? kTile / 2 : kTile);
  for (int i = thread; i < kSide * 8; i += 128) {
    const int row = i / 8, chunk = i % 8;
    copy_async(kB + row * 128 + ((chunk ^ row % 8) << 4), data.b + row * kSide + chunk * 8, true);
  }
  if (!is("one arrival missing") || thread != 5) barrier_arrive_copied(kCopied);
  else copy_commit(), copy_wait<0>();
  if (is("end before its copies have landed") && thread == 5) return;
  if (is("one arrival too many") && thread == 5) barrier_arrive(kCopied);
  barrier_wait(kLoaded, 0);
  if (!is("copies not waited for")) barrier_wait(kCopied, 0);
  if (is("buffer filled again")) sync_block();  // and no thread waits meanwhile
  if (!is("no fence")) fence_products();

  float c[kSide / 2] = {};
  uint32_t p[4];  // A's first 16 columns, as an operand in registers
  for (int i = 0; i < 4; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i % 2), column = thread % 4 * 2 + 8 * (i / 2);
    p[i] = uint32_t(data.a[row * kSide + column]) | uint32_t(data.a[row * kSide + column + 1]) << 16;
  }
  if (!is("no product_begin")) product_begin();
  const Matrix a(kA, 16, 1024), b(is("another operand") && thread == 5 ? kA : kB, 16, 1024);
  for (int k = 0; k < kSide / 16; ++k) multiply_shared<Bfloat16>(c, a.at(k * 32), b.at(k * 32), k > 0);
  product_commit();
  float d[kSide / 2] = {float(misread)};
  product_begin();
  multiply_registers<Bfloat16>(d, p, Matrix(kB, kTile, 1024).at(0));
  product_commit();
  if (is("products not waited for")) return;
  if (is("operand in registers changed") && thread == 5) p[1] ^= 1;
  if (is("accumulator changed") && thread == 5) c[3] += 1.0f;
  if (is("buffer filled again") && thread == 0) load(data, 1, kTile);
  if (is("buffer filled again")) barrier_wait(kLoaded, 1);
  product_wait<1>();
  const float early = d[0];
  product_wait<0>();
  for (int i = 0; i < kSide / 2; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    data.c[row * kSide + column] = c[i] + (is("accumulator read") && i == 0 ? early : d[i]);
  }
}

}  // namespace
}  // namespace ha

// Runs the product; with an unknown mistake, or none, that is correct. Returns how many results are wrong.
extern "C" __attribute__((visibility("default"))) int ha_emulated_mistake(const char* mistake) {
  using namespace ha;
  static Data data;
  for (int i = 0; i < kSide * kSide; ++i) data.a[i] = number(i / kSide, i % kSide), data.b[i] = number(i % kSide, i / kSide);
  emulate(1, 128, kShared, [&] { run(mistake, data); });
  int wrong = 0;
  for (int i = 0; i < kSide; ++i)
    for (int j = 0; j < kSide; ++j) {
      float sum = 0;
      for (int k = 0; k < kSide; ++k) sum += to_float(Bfloat16{data.a[i * kSide + k]}) * to_float(Bfloat16{data.b[j * kSide + k]});
      for (int k = 0; k < 16; ++k) sum += to_float(Bfloat16{data.a[i * kSide + k]}) * to_float(Bfloat16{data.b[k * kSide + j]});
      wrong += data.c[i * kSide + j] != sum;
    }
  return wrong;
}
