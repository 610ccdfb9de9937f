// Standard normal numbers of a seed, equal to numpy's `Generator(PCG64(seed)).standard_normal(n, float32)`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

class NoiseStream {
  public:
    explicit NoiseStream(uint64_t seed);
    std::vector<float> draw(size_t count);  // the next ones

  private:
    void advance();
    uint32_t word();
    float uniform();  // [0, 1) in steps of 2^-24
    float normal();
    float tail(uint32_t size);

    unsigned __int128 state_, increment_;
    uint32_t spare_ = 0;
    bool has_spare_ = false;
};
