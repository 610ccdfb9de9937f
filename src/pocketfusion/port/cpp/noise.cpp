// PCG64 is O'Neill's XSL-RR 128/64 (HMC-CS-2014-0905), seeded by her seed_seq as numpy's SeedSequence has it; the normal
// numbers are Marsaglia and Tsang's ziggurat (J. Stat. Software 5(8), 2000) of 256 layers in float32.
#include "noise.h"

#include <cmath>

namespace {

constexpr double kEdge = 3.6541528853610088, kArea = 0.00492867323399;  // the lowest layer's edge, each layer's area

struct Ziggurat {
    float width[256], height[256];  // of a unit, 2^-23 of the layer; the density at its edge
    uint32_t inside[256];           // units that surely lie below the density

    Ziggurat() {
        const double units = 8388608;
        auto density = [](double x) { return std::exp(-0.5 * x * x); };
        double base = kArea / density(kEdge);
        inside[0] = static_cast<uint32_t>(std::lround(kEdge / base * units));
        inside[1] = 0;
        width[0] = static_cast<float>(base / units);
        width[255] = static_cast<float>(kEdge / units);
        height[0] = 1;
        height[255] = static_cast<float>(density(kEdge));
        double edge = kEdge, before = kEdge;
        for (int i = 254; i >= 1; i--, before = edge) {
            edge = std::sqrt(-2 * std::log(kArea / edge + density(edge)));
            inside[i + 1] = static_cast<uint32_t>(std::lround(edge / before * units));
            width[i] = static_cast<float>(edge / units);
            height[i] = static_cast<float>(density(edge));
        }
    }
};

const Ziggurat kLayers;

uint32_t mixed(uint32_t value) { return value ^ value >> 16; }

}  // namespace

NoiseStream::NoiseStream(uint64_t seed) {
    uint32_t constant = 0x43b0d7e5, pool[4];
    auto hash = [&](uint32_t value) {
        value ^= constant;
        constant *= 0x931e8875;
        return mixed(value * constant);
    };
    auto mix = [](uint32_t x, uint32_t y) { return mixed(x * 0xca01f9ddu - y * 0x4973f715u); };
    for (int i = 0; i < 4; i++) pool[i] = hash(i == 0 ? uint32_t(seed) : i == 1 ? uint32_t(seed >> 32) : 0);
    for (int from = 0; from < 4; from++) {
        for (int to = 0; to < 4; to++) {
            if (from != to) pool[to] = mix(pool[to], hash(pool[from]));
        }
    }
    uint32_t last = 0x8b51f9dd;
    uint64_t words[4] = {};
    for (int i = 0; i < 8; i++) {
        uint32_t value = pool[i % 4] ^ last;
        last *= 0x58f38ded;
        words[i / 2] |= uint64_t(mixed(value * last)) << 32 * (i % 2);
    }
    increment_ = (static_cast<unsigned __int128>(words[2]) << 64 | words[3]) << 1 | 1;
    state_ = increment_ + (static_cast<unsigned __int128>(words[0]) << 64 | words[1]);
    advance();
}

void NoiseStream::advance() {
    const auto multiplier = static_cast<unsigned __int128>(0x2360ed051fc65da4) << 64 | 0x4385df649fccf645;
    state_ = state_ * multiplier + increment_;
}

uint32_t NoiseStream::word() {
    if (has_spare_) {
        has_spare_ = false;
        return spare_;
    }
    advance();
    uint64_t folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
    int turn = static_cast<int>(state_ >> 122);
    uint64_t value = folded >> turn | folded << (-turn & 63);
    spare_ = static_cast<uint32_t>(value >> 32);
    has_spare_ = true;
    return static_cast<uint32_t>(value);
}

float NoiseStream::uniform() { return static_cast<float>(word() >> 8) * (1.0f / 16777216.0f); }

float NoiseStream::normal() {
    for (;;) {
        uint32_t bits = word(), layer = bits & 255, size = bits >> 9 & 0x7fffff;
        float x = static_cast<float>(size) * kLayers.width[layer];
        if (bits & 256) x = -x;
        if (size < kLayers.inside[layer]) return x;
        if (layer == 0) return tail(size);
        float between = (kLayers.height[layer - 1] - kLayers.height[layer]) * uniform() + kLayers.height[layer];
        if (between < std::exp(-0.5 * x * x)) return x;
    }
}

float NoiseStream::tail(uint32_t size) {  // beyond the lowest layer (Marsaglia, 1964)
    for (;;) {
        float x = static_cast<float>(1 / kEdge) * -std::log1p(-uniform());
        float y = -std::log1p(-uniform());
        if (y + y > x * x) {
            float out = static_cast<float>(kEdge) + x;
            return size >> 8 & 1 ? -out : out;
        }
    }
}

std::vector<float> NoiseStream::draw(size_t count) {
    std::vector<float> numbers(count);
    for (float& number : numbers) number = normal();
    return numbers;
}
