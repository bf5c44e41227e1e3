// The schemas of every native op. Importing megatron_rl._C loads this library, which registers
// them.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <torch/csrc/stable/library.h>

#define MRL_LOSS_INPUTS                                                     \
  "Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? rollout_logprobs, "  \
  "Tensor advantages, Tensor weights, int kind, float low, float high, "    \
  "float? dual_clip, float kl_coef, int kl_estimator, float entropy_coef, " \
  "float correction_low, float? correction_high, bool correction_masks, "   \
  "bool with_entropy, "

STABLE_TORCH_LIBRARY(megatron_rl, m) {
  m.def(
      "row_stats(Tensor logits, Tensor targets, Tensor? weights, int vocab_start, "
      "int valid_vocab, float inv_temp, bool with_entropy) -> Tensor");
  m.def(
      "draw_stats(Tensor logits, Tensor seeds, Tensor places, Tensor temperatures, "
      "int vocab_start, int valid_vocab) -> Tensor");
  m.def(
      "draw_from_head(Tensor hidden, Tensor weight, Tensor seeds, Tensor places, "
      "Tensor temperatures, int vocab_start, int valid_vocab) -> Tensor");
  m.def("merge_stats(Tensor stats) -> (Tensor logprobs, Tensor entropy, Tensor log_sum_exp)");
  m.def("token_loss(Tensor stats, " MRL_LOSS_INPUTS
        "float inv_temp) -> (Tensor logprobs, Tensor entropy, Tensor params, Tensor loss, "
        "Tensor sums, Tensor extrema)");
  m.def(
      "dlogits_(Tensor(a!) logits, Tensor targets, Tensor params, Tensor? grad_scale, "
      "int vocab_start, int valid_vocab, float inv_temp) -> ()");
  m.def(
      "dlogits(Tensor logits, Tensor targets, Tensor params, Tensor? grad_scale, "
      "int vocab_start, int valid_vocab, float inv_temp) -> Tensor");
  m.def("policy_loss_onepass_(Tensor(a!) logits, Tensor targets, " MRL_LOSS_INPUTS
        "int valid_vocab, float inv_temp, float grad_scale) -> (Tensor logprobs, Tensor entropy, "
        "Tensor loss, Tensor sums, Tensor extrema)");
  m.def("rescale_if_(Tensor(a!) x, Tensor grad, float expected) -> ()");
  m.def(
      "group_stats(Tensor rewards, Tensor offsets, int std_ddof, int keep_rules, "
      "int advantage_mode, float std_eps) -> (Tensor mean, Tensor std, Tensor max, Tensor min, "
      "Tensor counts, Tensor flags, Tensor keep, Tensor advantages)");
  m.def("turn(Tensor heads, Tensor cos, Tensor sin, int sign) -> Tensor");
  m.def("swiglu(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor normed, Tensor inverse)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse) -> "
      "(Tensor grad_x, Tensor grad_weight)");
  m.def(
      "attend_next_(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor positions, float scale, int window) -> Tensor");
  m.def("multiply_(Tensor left, Tensor right, Tensor(a!) out, bool adds) -> ()");
  m.def("shared_create(Tensor pids, int slot_bytes) -> int");
  m.def("shared_open(Tensor pids, int fd, int rank, int slot_bytes, float timeout_s) -> int");
  m.def("shared_close(Tensor anchor, int group) -> ()");
  m.def("shared_all_reduce_(Tensor(a!) x, int group, int reduction) -> ()");
  m.def("shared_reduce_scatter(Tensor(a!) out, Tensor x, int group, int reduction) -> ()");
  m.def("shared_all_gather(Tensor(a!) out, Tensor x, int group) -> ()");
  m.def(
      "shared_all_to_all(Tensor(a!) out, Tensor x, Tensor sent, Tensor received, int group) -> ()");
  m.def("shared_broadcast_(Tensor(a!) x, int group, int root) -> ()");
  m.def("shared_barrier(Tensor anchor, int group) -> ()");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
