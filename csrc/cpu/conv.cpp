// Low-bit convolution: the activation once to channels-last codes, the weights once to panels, then one of three paths.

#include "cpu/conv.h"

#include <algorithm>
#include <vector>

#include "cpu/few_rows.h"
#include "cpu/gemm.h"

namespace qk::cpu::QK_CPU_ISA {
namespace {

// Visits output pixels in order without dividing at each.
struct Position {
  Position(const ConvGeometry& g, int64_t pixel)
      : g(g), n(pixel / (g.out_height * g.out_width)), oy(pixel / g.out_width % g.out_height), ox(pixel % g.out_width) {}

  void next() {
    if (++ox < g.out_width) return;
    ox = 0;
    if (++oy < g.out_height) return;
    oy = 0;
    ++n;
  }

  const ConvGeometry& g;
  int64_t n, oy, ox;
};

// A 1 x 1 window: the row is the input pixel itself. Only where codes need no widening.
struct RowSource {
  static constexpr bool kGathers = false;
  template <class Code>
  static constexpr bool kGives = sizeof(Code) == 1;

  void fill(int64_t pixel, int64_t count, int64_t group, Rows<uint8_t>& rows) const {
    const int64_t channels = g.in_channels / g.groups;
    Position at(g, pixel);
    for (int64_t i = 0; i < count; ++i, at.next()) {
      const int64_t in = (at.n * g.in_height + at.oy * g.stride_height) * g.in_width + at.ox * g.stride_width;
      rows.row[i] = codes + in * g.in_channels + group * channels;
      rows.window_class[i] = 0;
    }
  }

  const ConvGeometry& g;
  const uint8_t* codes;
};

#if defined(__AVX512F__)
// The image with its padding, so that each window lies in it whole: [batch, height, width, channels], zeros around.
struct Padded {
  Padded(const ConvGeometry& g, const uint8_t* codes)
      : height((g.out_height - 1) * g.stride_height + (g.kernel_height - 1) * g.dilation_height + 1),
        width((g.out_width - 1) * g.stride_width + g.kernel_width),
        data(codes) {
    if (g.pad_top == 0 && g.pad_left == 0 && height <= g.in_height && width <= g.in_width) {
      height = g.in_height;
      width = g.in_width;
      return;
    }
    owned = Buffer<uint8_t>(g.batch * height * width * g.in_channels);
    data = owned.data();
    parallel_for(g.batch * height, std::max<int64_t>(1, (1 << 16) / (width * g.in_channels)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) copy_row(g, codes, i / height, i % height);
                 });
  }

  // Row y of an image.
  void copy_row(const ConvGeometry& g, const uint8_t* codes, int64_t image, int64_t y) const {
    uint8_t* const to = owned.data() + (image * height + y) * width * g.in_channels;
    const int64_t from = y - g.pad_top, columns = std::min(g.in_width, width - g.pad_left);
    if (from < 0 || from >= g.in_height || columns <= 0) {
      std::fill_n(to, width * g.in_channels, uint8_t{0});
      return;
    }
    const int64_t before = g.pad_left * g.in_channels, inside = columns * g.in_channels;
    std::fill_n(to, before, uint8_t{0});
    std::memcpy(to + before, codes + (image * g.in_height + from) * g.in_width * g.in_channels, inside);
    std::fill_n(to + before + inside, width * g.in_channels - before - inside, uint8_t{0});
  }

  int64_t height, width;
  const uint8_t* data;
  Buffer<uint8_t> owned;  // empty where nothing is padded
};

// Windows that are read where they lie, a line for each row of the kernel.
struct LineSource {
  static constexpr bool kGathers = false;
  template <class Code>
  static constexpr bool kGives = true;

  static bool suits(const ConvGeometry& g, const Plan& plan) {
    return plan.path == Path::kPatches && plan.depth > 0 && g.groups == 1 && g.dilation_width == 1 && !plan.wide &&
           !plan.by_planes() && g.kernel_width * g.in_channels % kDepth == 0;
  }

  void fill(int64_t pixel, int64_t count, int64_t, Rows<uint8_t>& rows) const {
    rows.lines = g.kernel_height;
    rows.pitch = g.dilation_height * image.width * g.in_channels;
    Position at(g, pixel);
    for (int64_t i = 0; i < count; ++i, at.next()) {
      const int64_t first = (at.n * image.height + at.oy * g.stride_height) * image.width + at.ox * g.stride_width;
      rows.row[i] = image.data + first * g.in_channels;
      rows.window_class[i] = window.of(at.oy, at.ox);
    }
  }

  const ConvGeometry& g;
  const Window& window;
  const Padded image;
};

// Windows whose lines are short and not whole steps, as those of an image of three channels: copied into rows by a load and
// a store each. What a store writes past its line the next one overwrites, or nobody reads but with weights of zero.
struct ShortLineSource {
  static constexpr bool kGathers = true;
  template <class Code>
  static constexpr bool kGives = true;

  static bool suits(const ConvGeometry& g, const Plan& plan) {
    return plan.path == Path::kPatches && plan.depth > 0 && g.groups == 1 && g.dilation_width == 1 &&
           g.kernel_width * g.in_channels <= 64;
  }

  void fill(int64_t pixel, int64_t count, int64_t, Rows<uint8_t>& rows) const {
    const bool fits_32 = g.kernel_width * g.in_channels <= 32;
    fits_32 ? fill_by<32>(pixel, count, rows) : fill_by<64>(pixel, count, rows);
  }

  template <int kBytes>
  void fill_by(int64_t pixel, int64_t count, Rows<uint8_t>& rows) const {
    const int64_t line = g.kernel_width * g.in_channels, pitch = g.dilation_height * image.width * g.in_channels;
    const __mmask64 there = ~0ull >> (64 - line);  // the image may end there
    const int64_t kernel_height = g.kernel_height, width = plan.steps() * kDepth;
    Position at(g, pixel);
    for (int64_t i = 0; i < count; ++i, at.next()) {
      const int64_t first = (at.n * image.height + at.oy * g.stride_height) * image.width + at.ox * g.stride_width;
      const uint8_t* from = image.data + first * g.in_channels;
      uint8_t* to = rows.gathered.data() + i * width;
      rows.row[i] = to;
      rows.window_class[i] = window.of(at.oy, at.ox);
      for (int64_t kh = 0; kh < kernel_height; ++kh, from += pitch, to += line) {
        const __m512i codes = _mm512_maskz_loadu_epi8(there, from);
        if constexpr (kBytes == 32)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(codes));
        else
          _mm512_storeu_si512(to, codes);
      }
    }
  }

  const ConvGeometry& g;
  const Plan& plan;
  const Window& window;
  const Padded image;
};
#endif

// Copies each window into a row, (kh, kw, channel) as in the weights, with zeros where it leaves the image.
struct PatchSource {
  static constexpr bool kGathers = true;
  template <class Code>
  static constexpr bool kGives = true;

  template <class Code>
  void fill(int64_t pixel, int64_t count, int64_t group, Rows<Code>& rows) const {
    const int64_t width = plan.steps() * kDepth;
    Position at(g, pixel);
    for (int64_t i = 0; i < count; ++i, at.next()) {
      Code* const row = rows.gathered.data() + i * width;
      rows.row[i] = row;
      gather(at, group, row);
      rows.window_class[i] = window.of(at.oy, at.ox);
    }
  }

  template <class Code>
  void gather(const Position& at, int64_t group, Code* row) const {
    const int64_t channels = g.in_channels / g.groups, line = g.kernel_width * channels;
    const TapRange valid_rows = window.rows.ranges[window.rows.of[at.oy]];
    const TapRange valid = window.columns.ranges[window.columns.of[at.ox]];
    const int64_t iy = at.oy * g.stride_height - g.pad_top, ix = at.ox * g.stride_width - g.pad_left;
    for (int64_t kh = 0; kh < g.kernel_height; ++kh, row += line) {
      if (kh < valid_rows.first || kh >= valid_rows.last) {
        std::fill(row, row + line, Code{0});
        continue;
      }
      // Where this kernel row begins; with padding, perhaps outside the image.
      const int64_t from =
          ((at.n * g.in_height + iy + kh * g.dilation_height) * g.in_width + ix) * g.in_channels + group * channels;
      std::fill(row, row + valid.first * channels, Code{0});
      if (contiguous_line) {
        copy_codes(row + valid.first * channels, codes + (from + valid.first * channels), valid.count() * channels);
      } else {
        for (int64_t kw = valid.first; kw < valid.last; ++kw)
          copy_codes(row + kw * channels, codes + (from + kw * g.dilation_width * g.in_channels), channels);
      }
      std::fill(row + valid.last * channels, row + line, Code{0});
    }
  }

  const ConvGeometry& g;
  const Plan& plan;
  const Window& window;
  const uint8_t* codes;
  bool contiguous_line;  // the taps of a kernel row are neighbours in memory
};

// Digits of codes [n] as codes of their own, [digits][n and a vector more].
struct Digits {
  Digits(const uint8_t* codes, int64_t n, Kind kind, int digits) : stride(n + kPanelLanes), owned(digits * stride) {
    for (int digit = 0; digit < digits; ++digit)
      parallel_for(n, 1 << 15, [&](int64_t begin, int64_t end) {
        uint8_t* const to = owned.data() + digit * stride;
        for (int64_t i = begin; i < end; ++i) to[i] = static_cast<uint8_t>(digit_of_code(kind, codes[i], digit));
      });
  }

  int64_t stride;
  Buffer<uint8_t> owned;
};

// One input channel an output channel: channels are the lanes, and each window is read where it lies.
class Depthwise {
 public:
  Depthwise(const LowbitArgs& args, const Plan& plan, const Window& window, const uint8_t* codes, const Weights& weights,
            const Epilogue& epilogue)
      : g_(args.geometry),
        plan_(plan),
        window_(window),
        codes_(codes),
        digits_(codes, args.geometry.batch * args.geometry.in_height * args.geometry.in_width * args.geometry.in_channels,
                args.x_kind, plan.x_digits),
        weights_(weights),
        epilogue_(epilogue),
        output_(args) {}

  void run() const { plan_.by_planes() ? run_with<float>() : run_with<int32_t>(); }

 private:
  static constexpr int64_t kPixels = 4 * kLanes;
  static constexpr int64_t kTogether = 8;  // pixels that are finished together

  // The valid taps of one class of windows, and their weights for a panel of channels; neighbours mostly share theirs.
  struct Taps {
    int64_t window_class = -1, channel = -1;
    std::vector<Tap> list;
#if defined(__AVX512F__)
    Buffer<int8_t> weights;  // [groups of taps][kPanelLanes][kTapGroup]
#endif
  };

  // Sum: int32_t, or float by planes.
  template <class Sum>
  void run_with() const {
    const int64_t pixels = g_.batch * g_.out_height * g_.out_width, blocks = (pixels + kPixels - 1) / kPixels;
    const int64_t chunks = (plan_.slots() + kPanelLanes - 1) / kPanelLanes;
    parallel_for(blocks * chunks, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> staged(kPixels * kPanelLanes), turned(kPixels * kPanelLanes);
      alignas(64) Sum dots[kTogether * kPanelLanes], sums[kTogether * kPanelLanes];
      int64_t classes[kTogether];
      Taps taps;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t pixel = task / chunks * kPixels, count = std::min(kPixels, pixels - pixel);
        const int64_t channel = task % chunks * kPanelLanes, lanes = std::min<int64_t>(kPanelLanes, plan_.slots() - channel);
        Position at(g_, pixel);
        for (int64_t first = 0; first < count; first += kTogether) {
          const int64_t together = std::min(kTogether, count - first);
          for (int64_t i = 0; i < together; ++i, at.next()) {
            find_taps(at, channel, taps);
            classes[i] = taps.window_class;
            one_pixel(at, taps, channel, lanes, dots + i * kPanelLanes, sums + i * kPanelLanes);
          }
          epilogue_.finish(Sums<Sum, true>{dots, kPanelLanes, sums, classes}, together, channel, lanes,
                           staged.data() + first * kPanelLanes);
        }
        output_.write(staged.data(), pixel, count, channel, std::min<int64_t>(kPanelLanes, g_.out_channels - channel),
                      turned.data());
      }
    });
  }

  void find_taps(const Position& at, int64_t channel, Taps& taps) const {
    const int64_t window_class = window_.of(at.oy, at.ox);
    if (taps.window_class != window_class || taps.channel != channel) list_taps(at, window_class, channel, taps);
  }

  // Seldom called: kept out of the loop over pixels.
  [[gnu::noinline]] void list_taps(const Position& at, int64_t window_class, int64_t channel, Taps& taps) const {
    taps.window_class = window_class;
    taps.channel = channel;
    taps.list.clear();
    const TapRange rows = window_.rows.ranges[window_.rows.of[at.oy]];
    const TapRange columns = window_.columns.ranges[window_.columns.of[at.ox]];
    for (int64_t kh = rows.first; kh < rows.last; ++kh)
      for (int64_t kw = columns.first; kw < columns.last; ++kw)
        taps.list.push_back({(kh * g_.dilation_height * g_.in_width + kw * g_.dilation_width) * g_.in_channels,
                             (kh * g_.kernel_width + kw) * plan_.slots()});
#if defined(__AVX512F__)
    if (!plan_.by_planes()) pack_weights(taps);
#endif
  }

#if defined(__AVX512F__)
  void pack_weights(Taps& taps) const {
    const int64_t taps_of_all = g_.kernel_height * g_.kernel_width, count = static_cast<int64_t>(taps.list.size());
    const int64_t channel = taps.channel, lanes = std::min<int64_t>(kPanelLanes, plan_.slots() - channel);
    if (!taps.weights.data()) taps.weights = Buffer<int8_t>(divide_up(taps_of_all, kTapGroup) * kGroupBytes);
    for (int64_t t = 0; t < count; t += kTapGroup)
      for (int64_t c = 0; c < lanes; c += kLanes)
        _mm512_store_si512(taps.weights.data() + t / kTapGroup * kGroupBytes + c * kTapGroup,
                           packed_taps(weights_.taps.data() + channel + c, taps.list.data() + t,
                                       static_cast<int>(std::min<int64_t>(kTapGroup, count - t)), weights_.zero));
  }
#endif

  // dots and sums of `lanes` channels.
  void one_pixel(const Position& at, const Taps& taps, int64_t channel, int64_t lanes, int32_t* dots, int32_t* sums) const {
    const int64_t first = first_code(at, channel);
#if defined(__AVX512F__)
    const int64_t count = static_cast<int64_t>(taps.list.size());
    int64_t c = 0;
    for (; c + 2 * kLanes <= lanes; c += 2 * kLanes)
      dot_packed_taps<2>(codes_, first + c, taps.weights.data() + c * kTapGroup, kGroupBytes, taps.list.data(), count,
                         weights_.zero, dots + c, sums + c);
    if (c < lanes)
      dot_packed_taps<1>(codes_, first + c, taps.weights.data() + c * kTapGroup, kGroupBytes, taps.list.data(), count,
                         weights_.zero, dots + c, sums + c);
#else
    dot(codes_, first, weights_.taps.data() + channel, taps, lanes, dots, sums);
#endif
  }

  // By planes: the products, and the activations, of all digits.
  void one_pixel(const Position& at, const Taps& taps, int64_t channel, int64_t lanes, float* products,
                 float* activations) const {
    const int64_t plane = g_.kernel_height * g_.kernel_width * plan_.slots();
    int32_t dots[kPanelLanes], sums[kPanelLanes];
    std::fill_n(products, lanes, 0.0f);
    std::fill_n(activations, lanes, 0.0f);
    for (int i = 0; i < plan_.w_digits; ++i)
      for (int j = 0; j < plan_.x_digits; ++j) {
        dot(digits_.owned.data() + j * digits_.stride, first_code(at, channel), weights_.taps.data() + channel + i * plane,
            taps, lanes, dots, sums);
        const float* const step = epilogue_.pair_steps(i, j) + channel;
        for (int64_t c = 0; c < lanes; ++c) products[c] = add_digit(products[c], step[c], static_cast<float>(dots[c]));
        if (i > 0) continue;
        const float own = epilogue_.activation_step(j);
        for (int64_t c = 0; c < lanes; ++c) activations[c] = add_digit(activations[c], own, static_cast<float>(sums[c]));
      }
  }

  // Where a window begins: with padding, perhaps outside the image.
  int64_t first_code(const Position& at, int64_t channel) const {
    const int64_t iy = at.oy * g_.stride_height - g_.pad_top, ix = at.ox * g_.stride_width - g_.pad_left;
    return ((at.n * g_.in_height + iy) * g_.in_width + ix) * g_.in_channels + channel;
  }

  void dot(const uint8_t* codes, int64_t first, const int32_t* weights, const Taps& taps, int64_t lanes, int32_t* dots,
           int32_t* sums) const {
    const int64_t count = static_cast<int64_t>(taps.list.size());
    if (lanes == kPanelLanes) return dot_taps<kTileVectors>(codes, first, weights, taps.list.data(), count, dots, sums);
    for (int64_t c = 0; c < lanes; c += kLanes)
      dot_taps<1>(codes, first + c, weights + c, taps.list.data(), count, dots + c, sums + c);
  }

#if defined(__AVX512F__)
  static constexpr int64_t kGroupBytes = kPanelLanes * kTapGroup;
#endif

  const ConvGeometry& g_;
  const Plan& plan_;
  const Window& window_;
  const uint8_t* codes_;
  const Digits digits_;  // by planes
  const Weights& weights_;
  const Epilogue& epilogue_;
  const Output output_;
};

}  // namespace

void lowbit_conv2d(const LowbitArgs& args) {
  const ConvGeometry& g = args.geometry;
  const Plan plan = plan_of(args);
  const Codes codes = encode_activation(args, plan);
  const Window window(g);
#if defined(__AVX512F__)
  const int64_t pixels = g.batch * g.out_height * g.out_width;
  if (FewRows::suits(args, plan, pixels)) {
    Rows<uint8_t> rows(pixels, 0);
    RowSource{g, codes.data}.fill(0, pixels, 0, rows);
    return FewRows(args, plan, rows.row.data(), pixels).run(plan, window);
  }
  if (suits_panels(args, plan, pixels)) return multiply_panels(args, plan, window, RowSource{g, codes.data});
#endif
  const Weights weights = unpack_weights(args, plan);
  Epilogue epilogue(args, plan, window);
  epilogue.take(weights, 0, plan.slots());
  switch (plan.path) {
    case Path::kRows:
      return run_gemm(args, plan, weights, epilogue, RowSource{g, codes.data});
    case Path::kPatches:
#if defined(__AVX512F__)
      if (LineSource::suits(g, plan))
        return run_gemm(args, plan, weights, epilogue, LineSource{g, window, Padded(g, codes.data)});
      if (ShortLineSource::suits(g, plan))
        return run_gemm(args, plan, weights, epilogue, ShortLineSource{g, plan, window, Padded(g, codes.data)});
#endif
      return run_gemm(args, plan, weights, epilogue,
                      PatchSource{g, plan, window, codes.data, g.groups == 1 && g.dilation_width == 1});
    case Path::kDepthwise:
      return Depthwise(args, plan, window, codes.data, weights, epilogue).run();
  }
}

}  // namespace qk::cpu::QK_CPU_ISA
