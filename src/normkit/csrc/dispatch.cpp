// Which instruction set runs: the best that is compiled in and that this machine has, chosen once at import.
// Read next: kernels.cpp.
#include <string.h>

#include <atomic>

#include "core.h"

namespace normkit {

namespace baseline {
extern const Kernels table;
}
#ifdef NORMKIT_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
#endif

namespace {

struct Choices {
    const Kernels* tables[4];
    int count = 0;

    Choices() {
#ifdef NORMKIT_X86
        __builtin_cpu_init();
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("fma");
        if (avx512 && __builtin_cpu_supports("avx512bf16")) tables[count++] = &avx512_bf16::table;
        if (avx512) tables[count++] = &avx512::table;
        // Every processor with AVX2 and FMA has F16C, which older compilers cannot be asked about.
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables[count++] = &avx2::table;
#endif
        tables[count++] = &baseline::table;
    }
};

const Choices& choices() {
    static const Choices all;
    return all;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* table = current.load(std::memory_order_relaxed);
    return table != nullptr ? *table : *choices().tables[0];
}

int isa_count() { return choices().count; }
const char* isa_name(int index) { return choices().tables[index]->name; }

bool set_isa(const char* name) {
    for (int i = 0; i < isa_count(); ++i) {
        if (strcmp(name, isa_name(i)) != 0) continue;
        current.store(choices().tables[i], std::memory_order_relaxed);
        return true;
    }
    return false;
}

}  // namespace normkit
