// A bundle's tokenizer.json (WordPiece or CLIP's byte pairs), as docs/port.md has the rules.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "json.h"

using Text = std::vector<char32_t>;

// unicode.json: what each code point counts as, whatever Unicode version the system has.
class Unicode {
  public:
    explicit Unicode(const Json& data);
    bool is(const char* set, char32_t c) const;
    Text lower(const Text& text) const;
    Text decompose(const Text& text) const;
    Text compose(const Text& text) const;

  private:
    int order(char32_t c) const;
    char32_t join(char32_t a, char32_t b) const;  // 0: they do not compose

    std::map<std::string, std::vector<std::pair<char32_t, char32_t>>> sets_;
    std::unordered_map<char32_t, Text> lower_, decomposed_;
    std::unordered_map<char32_t, int> classes_;
    std::map<std::pair<char32_t, char32_t>, char32_t> composed_;
};

struct Tokens {
    std::vector<int32_t> ids, mask;  // both of max_length
    int count = 0;                   // of ids that are no padding
};

class Tokenizer {
  public:
    Tokenizer(const Json& file, const Json& spec, const Unicode& unicode);
    Tokens encode(const std::string& prompt) const;

  private:
    struct Part {
        Text text;
        int id;  // of an added token, else -1
    };
    using Added = std::vector<std::pair<Text, int>>;

    static std::vector<Part> without(const Text& text, const Added& added);
    Text normalize(Text text) const;
    std::vector<Text> words(const Text& text) const;
    void pieces(const Text& word, std::vector<int32_t>& ids) const;
    void word_piece(const Text& word, std::vector<int32_t>& ids) const;
    void byte_pairs(const Text& word, std::vector<int32_t>& ids) const;

    const Unicode& unicode_;
    std::vector<Json> normalizers_;
    std::unordered_map<std::string, int> vocabulary_, ranks_;
    Added raw_, normalized_;
    std::vector<int32_t> before_, after_;
    std::string prefix_, suffix_, unknown_, letters_[256];
    size_t longest_word_ = 0;
    int length_, padding_;
    bool is_word_piece_;
};
