// Translates C++ exceptions into kinds and messages.
#include "shim_internal.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

#include <c10/util/Exception.h>

namespace {

bool mentions(const std::string& message, const char* words) {
  const std::string sought(words);
  return std::search(message.begin(), message.end(), sought.begin(), sought.end(), [](char a, char b) {
           return std::tolower(static_cast<unsigned char>(a)) == b;
         }) != message.end();
}

// Tells errors apart by the words of their message. Gloo throws types derived from
// std::runtime_error, and the wheel has no headers for them.
IceKind kind_by_words(const std::string& message, IceKind otherwise) {
  if (mentions(message, "timed out") || mentions(message, "timeout")) {
    return ICE_TIMEOUT;
  }
  if (mentions(message, "connection") || mentions(message, "socket") || mentions(message, "peer")) {
    return ICE_NETWORK;
  }
  return otherwise;
}

int32_t fail(IceKind kind, const char* text, char** message) noexcept {
  *message = ::strdup(text);
  return kind;
}

} // namespace

int32_t ice::translate(char** message) noexcept {
  try {
    try {
      throw;
    } catch (const ice::Failure& error) {
      return fail(error.kind, error.what(), message);
    } catch (const c10::DistNetworkError& error) {
      return fail(ICE_NETWORK, error.what_without_backtrace(), message);
    } catch (const c10::DistStoreError& error) {
      const std::string words(error.what_without_backtrace());
      return fail(mentions(words, "timeout") || mentions(words, "timed out") ? ICE_TIMEOUT : ICE_STORE, words.c_str(), message);
    } catch (const c10::DistError& error) {
      const std::string words(error.what_without_backtrace());
      return fail(mentions(words, "timeout") || mentions(words, "timed out") ? ICE_TIMEOUT : ICE_BACKEND, words.c_str(), message);
    } catch (const c10::ValueError& error) {
      return fail(ICE_INVALID_ARGUMENT, error.what_without_backtrace(), message);
    } catch (const c10::TypeError& error) {
      return fail(ICE_INVALID_ARGUMENT, error.what_without_backtrace(), message);
    } catch (const c10::IndexError& error) {
      return fail(ICE_INVALID_ARGUMENT, error.what_without_backtrace(), message);
    } catch (const c10::NotImplementedError& error) {
      return fail(ICE_INVALID_ARGUMENT, error.what_without_backtrace(), message);
    } catch (const c10::Error& error) {
      const std::string words(error.what_without_backtrace());
      const bool refused = words.rfind("ProcessGroupGloo::", 0) == 0;
      return fail(refused ? ICE_INVALID_ARGUMENT : kind_by_words(words, ICE_TORCH), words.c_str(), message);
    } catch (const std::exception& error) {
      return fail(kind_by_words(error.what(), ICE_BACKEND), error.what(), message);
    } catch (...) {
      return fail(ICE_OTHER, "an exception of an unknown type", message);
    }
  } catch (...) {
    return fail(ICE_OTHER, "out of memory while describing an error", message);
  }
}

ICE_API void ice_string_free(char* message) {
  std::free(message);
}

ICE_API void ice_bytes_free(uint8_t* data) {
  std::free(data);
}
