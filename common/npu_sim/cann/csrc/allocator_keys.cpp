// Lets torch_npu be imported beside a CUDA build of torch; not used beside a CPU build.
//
// Both the CUDA build and torch_npu announce the names of their own allocator options to torch,
// which ends the process when a name comes twice. The supported torch has no CPU build on PyPI, so
// where PyTorch's own index cannot be reached, the names that only the CUDA build knows (nobody
// uses its allocator here) are forgotten just before torch_npu announces its own.
#include <string>
#include <unordered_set>

// The function is private to torch's class, but its library exports it under this name.
std::unordered_set<std::string>& announced_names() __asm__(
    "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig14getMutableKeysB5cxx11Ev");

extern "C" void forget_allocator_options() {
    for (const char* name : {
             "backend",
             "graph_capture_record_stream_reuse",
             "per_process_memory_fraction",
             "pinned_free_catch_all",
             "pinned_num_register_threads",
             "pinned_reserve_segment_size_mb",
             "pinned_use_cuda_host_register",
             "pinned_use_hip_host_register",
             "release_lock_on_cudamalloc",
             "release_lock_on_hipmalloc",
             "throw_on_cudamalloc_oom",
         }) {
        announced_names().erase(name);
    }
}
