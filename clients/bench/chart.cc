#include "clients/bench/chart.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/bench/html_report.h"

namespace minitron::bench {
namespace {

// Pixels of the drawing; the page scales it.
constexpr double kWidth = 520;
constexpr double kHeight = 320;
constexpr double kLeft = 62;
constexpr double kRight = 26;
constexpr double kTop = 34;
constexpr double kBottom = 46;

// Told apart by people with any colour vision (Okabe and Ito); the dash tells them apart in print.
constexpr const char* kColours[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"};
constexpr const char* kDashes[] = {"", "7 3", "2 3", "9 3 2 3", "4 4", "1 2"};
constexpr size_t kNumStyles = 6;

class Axes {
 public:
  explicit Axes(const Chart& chart) : log_(chart.log_x) {
    double high = 0;
    double low = INFINITY;
    double y_high = chart.y_max;
    for (const Series& series : chart.series) {
      for (const auto& [x, y] : series.points) {
        if (log_ && x <= 0) continue;
        high = std::max(high, x);
        low = std::min(low, x);
        if (chart.y_max <= 0) y_high = std::max(y_high, y);
        empty_ = false;
      }
    }
    if (empty_) return;
    y_ticks_ = Ticks(y_high, 5);
    if (!log_) {
      x_ticks_ = Ticks(high, 6);
      x_high_ = x_ticks_.back();
      return;
    }
    x_low_ = std::floor(std::log10(low));
    x_high_ = std::max(x_low_ + 1, std::ceil(std::log10(high)));
    for (double power = x_low_; power <= x_high_; ++power) x_ticks_.push_back(std::pow(10, power));
  }

  double X(double x) const {
    const double value = log_ ? std::log10(x) : x;
    return kLeft + (value - x_low_) / (x_high_ - x_low_) * (kWidth - kLeft - kRight);
  }
  double Y(double y) const { return kHeight - kBottom - y / y_ticks_.back() * (kHeight - kTop - kBottom); }
  bool Has(double x) const { return !log_ || x > 0; }
  bool empty() const { return empty_; }
  const std::vector<double>& x_ticks() const { return x_ticks_; }
  const std::vector<double>& y_ticks() const { return y_ticks_; }

 private:
  bool log_;
  bool empty_ = true;
  double x_low_ = 0;
  double x_high_ = 1;
  std::vector<double> x_ticks_;
  std::vector<double> y_ticks_;
};

std::string Grid(const Chart& chart, const Axes& axes) {
  std::string svg;
  for (const double tick : axes.y_ticks()) {
    const double y = axes.Y(tick);
    absl::StrAppend(&svg,
                    absl::StrFormat("<line class=\"grid\" x1=\"%g\" x2=\"%g\" y1=\"%.1f\" y2=\"%.1f\"/>", kLeft,
                                    kWidth - kRight, y, y),
                    absl::StrFormat("<text x=\"%g\" y=\"%.1f\" text-anchor=\"end\">%g</text>", kLeft - 6, y + 4, tick));
  }
  for (const double tick : axes.x_ticks()) {
    const double x = axes.X(tick);
    absl::StrAppend(
        &svg,
        absl::StrFormat("<line class=\"grid\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%g\" y2=\"%g\"/>", x, x, kTop,
                        kHeight - kBottom),
        absl::StrFormat("<text x=\"%.1f\" y=\"%g\" text-anchor=\"middle\">%g</text>", x, kHeight - kBottom + 16, tick));
  }
  absl::StrAppend(&svg,
                  absl::StrFormat("<text x=\"%g\" y=\"%g\" text-anchor=\"middle\">%s</text>",
                                  (kLeft + kWidth - kRight) / 2, kHeight - 10, EscapeHtml(chart.x_label)),
                  absl::StrFormat("<text transform=\"translate(14 %g) rotate(-90)\" text-anchor=\"middle\">%s</text>",
                                  (kTop + kHeight - kBottom) / 2, EscapeHtml(chart.y_label)));
  return svg;
}

std::string Line(const Chart& chart, const Axes& axes, const Series& series, size_t style) {
  std::string points;
  std::string marks;
  for (const auto& [x, y] : series.points) {
    if (!axes.Has(x)) continue;
    absl::StrAppend(&points, absl::StrFormat("%.1f,%.1f ", axes.X(x), axes.Y(y)));
    if (!chart.markers) continue;
    absl::StrAppend(&marks, absl::StrFormat("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"><title>%s: %g, "
                                            "%g</title></circle>",
                                            axes.X(x), axes.Y(y), kColours[style], EscapeHtml(series.name), x, y));
  }
  return absl::StrFormat(
             "<polyline points=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\" stroke-dasharray=\"%s\"/>", points,
             kColours[style], kDashes[style]) +
         marks;
}

}  // namespace

std::vector<double> Ticks(double max, int count) {
  if (!(max > 0) || !std::isfinite(max)) max = 1;
  const double rough = max / count;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  const double digit = rough / power;
  const double step = power * (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10);
  std::vector<double> ticks;
  // A hair of slack: 0.3 / 0.1 must not need a fourth step.
  const auto steps = static_cast<int>(std::ceil(max / step - 1e-9));
  for (int i = 0; i <= steps; ++i) ticks.push_back(i * step);
  return ticks;
}

std::string ToSvg(const Chart& chart) {
  std::string svg = absl::StrFormat(
      "<figure><svg viewBox=\"0 0 %g %g\" role=\"img\" aria-label=\"%s\"><text class=\"title\" x=\"%g\" "
      "y=\"18\">%s</text>",
      kWidth, kHeight, EscapeHtml(chart.title), kLeft, EscapeHtml(chart.title));
  const Axes axes(chart);
  if (axes.empty()) {
    return svg + absl::StrFormat("<text x=\"%g\" y=\"%g\">no data</text></svg></figure>\n", kWidth / 2, kHeight / 2);
  }
  svg += Grid(chart, axes);
  std::string legend;
  for (size_t i = 0; i < chart.series.size(); ++i) {
    const size_t style = i % kNumStyles;
    svg += Line(chart, axes, chart.series[i], style);
    absl::StrAppend(&legend,
                    absl::StrFormat("<span><svg class=\"key\" viewBox=\"0 0 26 8\"><line x1=\"0\" x2=\"26\" y1=\"4\" "
                                    "y2=\"4\" stroke=\"%s\" stroke-width=\"2\" stroke-dasharray=\"%s\"/></svg> "
                                    "%s</span>",
                                    kColours[style], kDashes[style], EscapeHtml(chart.series[i].name)));
  }
  return svg + "</svg><figcaption>" + legend + "</figcaption></figure>\n";
}

}  // namespace minitron::bench
