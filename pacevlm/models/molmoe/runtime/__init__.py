"""MolmoE as requests run it: the adapter, and what runs its blocks fast.

One block has these implementations: the model's own in `pacevlm.models.molmoe.blocks`, four here, and the last three
in `pacevlm.models`. What was measured is of the embedded model on a CPU (docs/log.md, 2026-11-25), and of MolmoE-1B's
size with random weights on an H200 (docs/results.md, "A GPU").

================  ===========================  =======================================  ================================
what              when it runs                 why it exists                            held equal by
================  ===========================  =======================================  ================================
`MolmoEBlock`     inside transformers: in      the reference, with the checkpoint's     `test_against_transformers`
                  training and `generate`;     names, Auto classes and gradients of     (OLMoE, CLIP); `test_parity`
                  any device and dtype         weights                                  (the original)
`FrozenBlock`     in the adapter wherever      a module call costs 8 to 11 us: full     `test_frozen_block`,
                  none below does; any device  knobs went from 65 to 52 ms, low/4/12    to the bit
                  and dtype, gradients of      from 32 to 26, with normalising queries
                  tokens alone                 and keys side by side
`CompiledBlock`   on a CPU in float32 with     without it full knobs take 1.35 [1.28,   `test_compiled_block`,
                  numba, where no gradient is  1.42] times as long, low/4/12 1.56       but for rounding
                  asked for
`CompiledDecode`  the same, for decode steps   a step takes 2.6 to 3.1 times what       `test_compiled_block`,
                  and latency tokens of one    reading its weights takes, it was 13.5   steps of one row
                  row, if blocks are small     (with `CompiledBlock`)
`TritonBlock`     on CUDA with Triton, where   a step of the graph took 3.1 ms, now     `test_gpu_kernels` and
                  no gradient is asked for     1.32, and a prefill 20.0 ms, now 9.8     `test_gpu_experts`, on a GPU
`GraphDecode`     on CUDA, for decode steps    a step is hundreds of kernels that wait  `test_graph_decode`,
                  of one row: one graph for    for Python                               without a graph on a CPU
                  each (top_k, num_blocks)
`GraphPrefill`    on CUDA in half precision,   a short prompt's kernels take longer to  `test_graph_prefill`,
                  for the prefill of one row:  launch than to run: a prefill of 1,219   without a graph on a CPU
                  one graph for each (block,   tokens took 9.8 ms, now 7.0
                  top_k, length)
`PrefixTree`      any of the others, for the   rows of one prompt and one top_k share   `test_prefix_tree` and
                  prefill of several rows      blocks up to the first that only some    `test_decoder`
                                               keep: a sweep makes 159 rollouts a
                                               second instead of 130
================  ===========================  =======================================  ================================
"""
