#include "json.h"

#include <cstdlib>
#include <fstream>
#include <sstream>

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + " cannot be read");
    std::stringstream content;
    content << file.rdbuf();
    return content.str();
}

static void append(std::string& out, char32_t c) {
    if (c < 0x80) {
        out += static_cast<char>(c);
    } else if (c < 0x800) {
        out += static_cast<char>(0xC0 | c >> 6);
        out += static_cast<char>(0x80 | (c & 63));
    } else if (c < 0x10000) {
        out += static_cast<char>(0xE0 | c >> 12);
        out += static_cast<char>(0x80 | (c >> 6 & 63));
        out += static_cast<char>(0x80 | (c & 63));
    } else {
        out += static_cast<char>(0xF0 | c >> 18);
        out += static_cast<char>(0x80 | (c >> 12 & 63));
        out += static_cast<char>(0x80 | (c >> 6 & 63));
        out += static_cast<char>(0x80 | (c & 63));
    }
}

std::string utf8(const std::vector<char32_t>& text) {
    std::string out;
    for (char32_t c : text) append(out, c);
    return out;
}

std::vector<char32_t> code_points(const std::string& text) {
    std::vector<char32_t> out;
    for (size_t i = 0; i < text.size();) {
        unsigned char first = text[i];
        int more = first < 0x80 ? 0 : first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : first >= 0xC0 ? 1 : -1;
        char32_t c = more == 0 ? first : more == 1 ? first & 31 : more == 2 ? first & 15 : first & 7;
        size_t end = i + 1;
        for (int k = 0; k < more; k++, end++) {
            if (end >= text.size() || (text[end] & 0xC0) != 0x80) {
                more = -1;
                break;
            }
            c = c << 6 | (text[end] & 63);
        }
        bool broken = more < 0 || (c >= 0xD800 && c < 0xE000) || c > 0x10FFFF;
        out.push_back(broken ? 0xFFFD : c);
        i = end;
    }
    return out;
}

namespace {

struct Parser {
    const std::string& in;
    size_t at = 0;

    [[noreturn]] void fail() { throw std::runtime_error("broken JSON at byte " + std::to_string(at)); }
    void space() {
        while (at < in.size() && (in[at] == ' ' || in[at] == '\n' || in[at] == '\r' || in[at] == '\t')) at++;
    }
    bool take(char c) {
        space();
        if (at < in.size() && in[at] == c) return at++, true;
        return false;
    }
    void need(char c) {
        if (!take(c)) fail();
    }
    unsigned hex() {
        if (at + 4 > in.size()) fail();
        unsigned code = std::strtoul(in.substr(at, 4).c_str(), nullptr, 16);
        at += 4;
        return code;
    }

    std::string text() {
        need('"');
        std::string out;
        while (at < in.size() && in[at] != '"') {
            if (in[at] != '\\') {
                out += in[at++];
                continue;
            }
            char escape = ++at < in.size() ? in[at++] : '?';
            if (escape == 'u') {
                char32_t c = hex();
                if (c >= 0xD800 && c < 0xDC00 && in.compare(at, 2, "\\u") == 0) {
                    at += 2;
                    c = 0x10000 + ((c - 0xD800) << 10) + (hex() - 0xDC00);
                }
                append(out, c);
            } else {
                const char* names = "nrtbf";
                const char* found = std::char_traits<char>::find(names, 5, escape);
                out += found ? "\n\r\t\b\f"[found - names] : escape;
            }
        }
        if (at++ >= in.size()) fail();
        return out;
    }

    Json value() {
        Json json;
        space();
        if (at >= in.size()) fail();
        char c = in[at];
        if (c == '{') {
            json.kind = Json::object;
            at++;
            if (take('}')) return json;
            do {
                space();
                std::string name = text();
                need(':');
                json.fields.emplace(std::move(name), value());
            } while (take(','));
            need('}');
        } else if (c == '[') {
            json.kind = Json::list;
            at++;
            if (take(']')) return json;
            do json.items.push_back(value());
            while (take(','));
            need(']');
        } else if (c == '"') {
            json.kind = Json::text;
            json.string = text();
        } else if (in.compare(at, 4, "true") == 0 || in.compare(at, 5, "false") == 0) {
            json.kind = Json::boolean;
            json.truth = c == 't';
            at += json.truth ? 4 : 5;
        } else if (in.compare(at, 4, "null") == 0) {
            at += 4;
        } else {
            char* end = nullptr;
            json.kind = Json::number;
            json.value = std::strtod(in.c_str() + at, &end);
            if (end == in.c_str() + at) fail();
            at = end - in.c_str();
        }
        return json;
    }
};

}  // namespace

Json Json::read(const std::string& path) {
    std::string content = read_file(path);
    try {
        Parser parser{content};
        return parser.value();
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(path + ": " + error.what());
    }
}
