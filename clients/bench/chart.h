// A line chart as inline SVG. Pure function.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace minitron::bench {

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;
};

struct Chart {
  std::string title;
  std::string x_label;
  std::string y_label;
  bool log_x = false;   // needs x above 0; others are left out
  bool markers = true;  // a circle with a tooltip per point
  double y_max = 0;     // 0: from the points
  std::vector<Series> series;
};

// Without any point: a frame that says so.
std::string ToSvg(const Chart& chart);

// Round numbers from 0 to at least `max`, about `count` of them.
std::vector<double> Ticks(double max, int count);

}  // namespace minitron::bench
