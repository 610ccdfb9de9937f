#include "png.h"

#include <algorithm>
#include <fstream>
#include <stdexcept>

namespace {

void put(std::string& out, uint32_t value) {  // most significant byte first
    for (int shift = 24; shift >= 0; shift -= 8) out += static_cast<char>(value >> shift & 255);
}

uint32_t crc(const std::string& data) {
    uint32_t value = 0xffffffff;
    for (unsigned char byte : data) {
        value ^= byte;
        for (int k = 0; k < 8; k++) value = value & 1 ? 0xedb88320 ^ value >> 1 : value >> 1;
    }
    return ~value;
}

void chunk(std::string& out, const std::string& type, const std::string& data) {
    put(out, static_cast<uint32_t>(data.size()));
    out += type + data;
    put(out, crc(type + data));
}

}  // namespace

void write_png(const std::string& path, const std::vector<uint8_t>& rgb, uint32_t width, uint32_t height) {
    std::string rows;
    for (uint32_t y = 0; y < height; y++) {
        rows += '\0';  // no filter
        rows.append(reinterpret_cast<const char*>(&rgb[3 * width * y]), 3 * width);
    }
    std::string packed("\x78\x01", 2);  // zlib, blocks that are stored as they are
    uint32_t low = 1, high = 0;
    for (unsigned char byte : rows) {
        low = (low + byte) % 65521;
        high = (high + low) % 65521;
    }
    for (size_t at = 0; at < rows.size(); at += 65535) {
        size_t length = std::min<size_t>(65535, rows.size() - at);
        packed += at + length == rows.size() ? '\1' : '\0';
        for (size_t part : {length, ~length}) {
            packed += static_cast<char>(part & 255);
            packed += static_cast<char>(part >> 8 & 255);
        }
        packed += rows.substr(at, length);
    }
    put(packed, high << 16 | low);
    std::string out("\x89PNG\r\n\x1a\n", 8), header;
    put(header, width);
    put(header, height);
    header += std::string("\x08\x02\0\0\0", 5);  // 8 bits, RGB
    chunk(out, "IHDR", header);
    chunk(out, "IDAT", packed);
    chunk(out, "IEND", "");
    std::ofstream file(path, std::ios::binary);
    if (!(file << out).flush()) throw std::runtime_error(path + " cannot be written");
}
