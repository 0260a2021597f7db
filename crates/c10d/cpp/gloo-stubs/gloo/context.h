// Stub: the PyTorch wheel has no gloo headers, and ProcessGroupGloo.hpp needs this type by pointer only. Never constructed.
#pragma once

#include <chrono>

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};

} // namespace gloo
