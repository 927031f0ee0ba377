// Products of a warp group (wgmma.mma_async). Layouts as in the PTX manual: operands in shared memory are matrices of 128-byte rows,
// swizzled, whose descriptors are read bit by bit; fragments in registers are those of mma.sync, a quarter of the rows a warp.
#include <algorithm>

#include "machine.h"
#include "sm90_emulator.h"

namespace ha {

constexpr int kRows = 64, kDepth = 16;
constexpr uint32_t kUnderWay = 0x7fb0a1d5;  // NaN that accumulators hold until their product lands

// Accumulators that products are under way into: the first product takes them out of the threads' registers, the last puts them back.
struct Accumulators {
  int columns = 0, products = 0;
  float* owners[kGroup] = {};
  std::vector<float> values;  // [kRows][columns]
};

struct Product {
  int count = 0, threads = 0;
  ProductOperands operands{};
  uint64_t after = 0;               // the latest write by a thread that a fence has to follow
  std::vector<uint16_t> a, b;       // as they were when the product was issued: [kRows][kDepth], [columns][kDepth]
  const uint32_t* words[kGroup] = {};
  std::shared_ptr<Accumulators> c;
};

namespace {

int64_t landed_products = 0;

Group& group() { return block.groups[block.current / kGroup]; }

// Where a thread's accumulator i, or the low element of its operand word, lies.
int row_of(int thread, int i) { return thread / kWarp * 16 + thread % kWarp / 4 + 8 * (i / 2 % 2); }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

struct Descriptor {
  uint32_t start, leading, stride;
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    require(bits >> 62 == 1 && (bits >> 49 & 7) == 0, "a matrix that is not swizzled over 128 bytes from a multiple of 1024 on");
  }
  // Address of 8 elements: of row `outer` from depth 8 `piece` on, or, transposed, of columns 8 `outer` .. at depth `piece`.
  uint32_t rows(int outer, int piece) const { return start + outer / 8 * stride + outer % 8 * 128 + piece * 16; }
  uint32_t columns(int outer, int piece) const {
    return start + outer / 8 * leading + outer % 8 * 16 + piece / 8 * stride + piece % 8 * 128;
  }
};

// The operand as [count][kDepth]; `visit` is called with each 16 bytes' address.
template <class Visit>
std::vector<uint16_t> read(uint64_t bits, int count, bool transposed, Visit visit) {
  const Descriptor matrix(bits);
  std::vector<uint16_t> out(count * kDepth);
  for (int outer = 0; outer < (transposed ? count / 8 : count); ++outer)
    for (int piece = 0; piece < (transposed ? kDepth : kDepth / 8); ++piece) {
      const uint32_t at = swizzled(transposed ? matrix.columns(outer, piece) : matrix.rows(outer, piece));
      require_shared(at, 16, 16, "a product's operand lies outside shared memory");
      visit(at);
      uint16_t values[8];
      std::memcpy(values, block.base + at, 16);
      for (int i = 0; i < 8; ++i) out[transposed ? (outer * 8 + i) * kDepth + piece : outer * kDepth + piece * 8 + i] = values[i];
    }
  return out;
}

std::shared_ptr<Product> start_product(int count, const ProductOperands& operands) {
  auto product = std::make_shared<Product>();
  product->count = count;
  product->operands = operands;
  const auto note = [&](uint32_t at) {
    const Written& written = block.written[at / 16];
    if (written.when > block.fibers[written.thread].fenced) product->after = std::max(product->after, written.when);
  };
  product->b = read(operands.b, 2 * count, operands.transposed, note);
  product->a = operands.registers ? std::vector<uint16_t>(kRows * kDepth) : read(operands.a, kRows, false, note);
  return product;
}

// The thread's accumulators leave its registers.
void give_accumulators(Product& product, float* c, int thread) {
  if (!product.c) {
    for (const auto& other : group().products)
      if (other->c && other->c->owners[thread] == c) product.c = other->c;
    if (!product.c) {
      product.c = std::make_shared<Accumulators>();
      product.c->columns = 2 * product.count;
      product.c->values.resize(kRows * 2 * product.count);
    }
    ++product.c->products;
  }
  Accumulators& all = *product.c;
  require(all.columns == 2 * product.count && (!all.owners[thread] || all.owners[thread] == c), "threads of a product disagree");
  if (all.owners[thread]) return;
  all.owners[thread] = c;
  for (int i = 0; i < product.count; ++i) {
    all.values[row_of(thread, i) * all.columns + column_of(thread, i)] = c[i];
    c[i] = bits_float(kUnderWay);
  }
}

void take_accumulators(const Accumulators& all) {
  for (int thread = 0; thread < kGroup; ++thread)
    for (int i = 0; i < all.columns / 2; ++i) {
      require(float_bits(all.owners[thread][i]) == kUnderWay, "accumulators were touched before product_wait");
      all.owners[thread][i] = all.values[row_of(thread, i) * all.columns + column_of(thread, i)];
    }
}

float number(uint16_t bits, bool half) { return half ? to_float(Half{bits}) : to_float(Bfloat16{bits}); }

void land_product(Product& product) {
  require(product.threads == kGroup, "a product that not every thread of the group has issued");
  const auto& operands = product.operands;
  const auto unchanged = [](uint32_t) {};
  require(read(operands.b, 2 * product.count, operands.transposed, unchanged) == product.b &&
              (operands.registers || read(operands.a, kRows, false, unchanged) == product.a),
          "shared memory changed under a product");
  for (int thread = 0; thread < kGroup && operands.registers; ++thread)
    for (int i = 0; i < 8; ++i) {
      const uint16_t now = uint16_t(product.words[thread][i / 2] >> 16 * (i % 2));
      require(product.a[row_of(thread, i) * kDepth + column_of(thread, i)] == now, "operands in registers changed under a product");
    }

  Accumulators& all = *product.c;
  const int columns = all.columns;
  std::vector<double> b(kDepth * columns), sum(columns);
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < kDepth; ++k) b[k * columns + n] = number(product.b[n * kDepth + k], operands.half);
  for (int m = 0; m < kRows; ++m) {
    float* const c = &all.values[m * columns];
    for (int n = 0; n < columns; ++n) sum[n] = operands.add ? c[n] : 0.0f;
    for (int k = 0; k < kDepth; ++k) {
      const double a = number(product.a[m * kDepth + k], operands.half);
      for (int n = 0; n < columns; ++n) sum[n] += a * b[k * columns + n];
    }
    for (int n = 0; n < columns; ++n) c[n] = round_to_zero(sum[n]);
  }
  if (--all.products == 0) take_accumulators(all);
  ++landed_products;
}

}  // namespace

// Nothing waits here: the first thread of the group to come makes the product, the others join it.
void issue_product(float* c, int count, const ProductOperands& operands) {
  Group& mine = group();
  Fiber& fiber = self();
  const int thread = block.current % kGroup;
  require(fiber.ready, "a product without product_begin before it");
  if (fiber.issued == mine.landed + mine.products.size()) mine.products.push_back(start_product(count, operands));
  Product& product = *mine.products[fiber.issued++ - mine.landed];
  const ProductOperands& first = product.operands;
  require(product.count == count && first.a == operands.a && first.b == operands.b && first.add == operands.add &&
              first.half == operands.half && first.transposed == operands.transposed,
          "threads of a product disagree");
  require(product.after <= fiber.fenced, "a product reads what threads have written and no fence_products lies between");
  give_accumulators(product, c, thread);
  if (operands.registers) {
    product.words[thread] = operands.registers;
    for (int i = 0; i < 8; ++i)
      product.a[row_of(thread, i) * kDepth + column_of(thread, i)] = uint16_t(operands.registers[i / 2] >> 16 * (i % 2));
  }
  ++product.threads;
}

void product_begin() { self().ready = true; }
void product_commit() {
  self().ready = false;
  self().commits.push_back(self().issued);
}
void product_wait(int pending) {
  Group& mine = group();
  meet(mine.meeting, kGroup, "product_wait of group", block.current / kGroup, [&] {
    Fiber* const fibers = &block.fibers[block.current / kGroup * kGroup];
    const std::vector<uint64_t> commits = self().commits;
    const size_t done = commits.size() - std::min(commits.size(), size_t(pending));
    for (int thread = 0; thread < kGroup; ++thread) {
      require(fibers[thread].commits == commits, "threads of a group have committed different products");
      fibers[thread].commits.erase(fibers[thread].commits.begin(), fibers[thread].commits.begin() + done);
    }
    for (const uint64_t last = done ? commits[done - 1] : 0; mine.landed < last; ++mine.landed) {
      land_product(*mine.products.front());
      mine.products.erase(mine.products.begin());
    }
  });
}

}  // namespace ha

// How many products have been computed: tells a test which kernels ran.
extern "C" __attribute__((visibility("default"))) int64_t ha_emulated_products() { return ha::landed_products; }
