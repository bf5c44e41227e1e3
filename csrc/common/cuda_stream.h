// torch's current CUDA stream, without linking libtorch_cuda, which a CPU build of torch lacks.
#pragma once

#if defined(MRL_WITH_CUDA)

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "tensors.h"

namespace megatron_rl {

// Makes a tensor's device current for the scope of an op.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor)
      : device_index_(tensor.get_device_index()), guard_(device_index_) {}

  void* stream() const {
    using CurrentStream = AOTITorchError (*)(int32_t, void**);
    static const CurrentStream current_stream = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      void* symbol =
          library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
      return reinterpret_cast<CurrentStream>(symbol);
    }();
    void* stream = nullptr;
    if (current_stream == nullptr || current_stream(device_index_, &stream) != 0) {
      throw std::runtime_error("megatron_rl: this torch does not tell its current CUDA stream");
    }
    return stream;
  }

 private:
  int32_t device_index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Error codes are cudaError_t; the names live in the launchers.
const char* cuda_error_text(int error);

inline void check_launch(const char* op, int error) {
  if (error == 0) return;
  throw std::runtime_error(std::string(op) + ": CUDA: " + cuda_error_text(error));
}

}  // namespace megatron_rl

#endif  // MRL_WITH_CUDA
