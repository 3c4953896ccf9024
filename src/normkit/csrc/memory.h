// Blocks of memory for large results, kept for the next one when a tensor goes: what takes longest in a large
// normalization is not its arithmetic but the first touch of fresh pages. Kept blocks are bounded (see limit()).
// Read next: tensors.cpp, which makes tensors of blocks.
#pragma once

#include <stdint.h>

namespace normkit {

// From this size on a result is worth a block; below, malloc keeps its own.
constexpr int64_t kLeastBlock = int64_t(4) << 20;

struct Block {
    void* data;
    int64_t bytes;
};

Block take_block(int64_t bytes);  // data is null where nothing may be kept, or the system has no more memory
void give_block(Block block);
int64_t set_block_limit(int64_t bytes);  // returns the limit before; blocks beyond the new one go back to the system
int64_t kept_bytes();

}  // namespace normkit
