// Stub: the PyTorch wheel has no gloo headers, and ProcessGroupGloo.hpp needs these types by pointer only.
#pragma once

namespace gloo::transport {

class Device;
class UnboundBuffer;

} // namespace gloo::transport
