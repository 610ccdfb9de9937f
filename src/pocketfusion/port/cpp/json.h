// JSON as far as a bundle's files need it.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct Json {
    enum Kind { null, boolean, number, text, list, object } kind = null;
    bool truth = false;
    double value = 0;
    std::string string;  // UTF-8
    std::vector<Json> items;
    std::map<std::string, Json> fields;

    static Json read(const std::string& path);

    bool has(const std::string& name) const { return fields.count(name) && fields.at(name).kind != null; }
    const Json& operator[](const std::string& name) const {
        auto found = fields.find(name);
        if (found == fields.end()) throw std::runtime_error("the JSON lacks \"" + name + "\"");
        return found->second;
    }
    const Json& operator[](size_t index) const { return items.at(index); }
    int whole() const { return static_cast<int>(value); }
    double number_or(const std::string& name, double other) const { return has(name) ? (*this)[name].value : other; }
    std::string text_or(const std::string& name, const std::string& other) const {
        return has(name) ? (*this)[name].string : other;
    }
    bool truth_or(const std::string& name, bool other) const { return has(name) ? (*this)[name].truth : other; }
};

std::string read_file(const std::string& path);
std::vector<char32_t> code_points(const std::string& utf8);  // half pairs and broken bytes become U+FFFD
std::string utf8(const std::vector<char32_t>& code_points);
