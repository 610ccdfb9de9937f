// An RGB picture as PNG, uncompressed: any viewer reads it, and no library is needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

void write_png(const std::string& path, const std::vector<uint8_t>& rgb, uint32_t width, uint32_t height);
