#include "tokenizer.h"

#include <algorithm>
#include <climits>

Unicode::Unicode(const Json& data) {
    for (const char* name : {"dropped", "spaces", "ideographs", "accents", "punctuation", "letters", "numbers"}) {
        for (const Json& range : data[name].items) sets_[name].emplace_back(range[0].whole(), range[1].whole());
    }
    auto fill = [&](const char* name, std::unordered_map<char32_t, Text>& table) {
        for (const Json& row : data[name].items) {
            Text& made = table[row[0].whole()];
            for (size_t i = 1; i < row.items.size(); i++) made.push_back(row[i].whole());
        }
    };
    fill("lower", lower_);
    fill("decomposed", decomposed_);
    for (const Json& row : data["classes"].items) {
        for (int c = row[0].whole(); c <= row[1].whole(); c++) classes_[c] = row[2].whole();
    }
    for (const Json& row : data["composed"].items) composed_[{row[0].whole(), row[1].whole()}] = row[2].whole();
}

bool Unicode::is(const char* set, char32_t c) const {
    const auto& ranges = sets_.at(set);
    auto after = std::upper_bound(ranges.begin(), ranges.end(), std::make_pair(c, char32_t(0x110000)));
    return after != ranges.begin() && std::prev(after)->second >= c;
}

int Unicode::order(char32_t c) const {
    auto found = classes_.find(c);
    return found == classes_.end() ? 0 : found->second;
}

Text Unicode::lower(const Text& text) const {
    Text made;
    for (char32_t c : text) {
        auto found = lower_.find(c);
        if (found == lower_.end()) made.push_back(c);
        else made.insert(made.end(), found->second.begin(), found->second.end());
    }
    return made;
}

Text Unicode::decompose(const Text& text) const {
    Text made;
    for (char32_t c : text) {
        auto found = decomposed_.find(c);
        if (c >= 0xAC00 && c < 0xD7A4) {  // Hangul
            char32_t index = c - 0xAC00;
            made.push_back(0x1100 + index / 588);
            made.push_back(0x1161 + index % 588 / 28);
            if (index % 28) made.push_back(0x11A7 + index % 28);
        } else if (found == decomposed_.end()) {
            made.push_back(c);
        } else {
            made.insert(made.end(), found->second.begin(), found->second.end());
        }
    }
    for (size_t start = 0; start < made.size();) {  // marks by class, those of one class as they stand
        size_t end = start;
        while (end < made.size() && order(made[end])) end++;
        std::stable_sort(made.begin() + start, made.begin() + end,
                         [&](char32_t a, char32_t b) { return order(a) < order(b); });
        start = std::max(end, start + 1);
    }
    return made;
}

char32_t Unicode::join(char32_t a, char32_t b) const {
    if (a >= 0x1100 && a < 0x1113 && b >= 0x1161 && b < 0x1176) return 0xAC00 + ((a - 0x1100) * 21 + b - 0x1161) * 28;
    if (a >= 0xAC00 && a < 0xD7A4 && (a - 0xAC00) % 28 == 0 && b >= 0x11A8 && b < 0x11C3) return a + b - 0x11A7;
    auto found = composed_.find({a, b});
    return found == composed_.end() ? 0 : found->second;
}

Text Unicode::compose(const Text& text) const {
    Text made;
    size_t starter = 0;
    bool any = false;
    int before = 0;  // the class of the last one that stayed behind the starter
    for (char32_t c : decompose(text)) {
        int now = order(c);
        if (any && (before < now || (before == 0 && starter + 1 == made.size()))) {
            if (char32_t joined = join(made[starter], c)) {
                made[starter] = joined;
                continue;
            }
        }
        if (now == 0) {
            starter = made.size();
            any = true;
        }
        before = now;
        made.push_back(c);
    }
    return made;
}

Tokenizer::Tokenizer(const Json& file, const Json& spec, const Unicode& unicode)
    : unicode_(unicode), length_(spec["max_length"].whole()), padding_(spec["pad_token_id"].whole()) {
    const Json &model = file["model"], &normalizer = file["normalizer"];
    is_word_piece_ = model["type"].string == "WordPiece";
    if (normalizer["type"].string == "Sequence") normalizers_ = normalizer["normalizers"].items;
    else normalizers_ = {normalizer};
    for (const auto& [piece, id] : model["vocab"].fields) vocabulary_[piece] = id.whole();
    prefix_ = model.text_or("continuing_subword_prefix", "");
    suffix_ = model.text_or("end_of_word_suffix", "");
    unknown_ = model.text_or("unk_token", "");
    if (is_word_piece_) {
        longest_word_ = model["max_input_chars_per_word"].whole();
    } else {
        int rank = 0;
        for (const Json& merge : model["merges"].items) {
            std::string pair = merge.kind == Json::text ? merge.string : merge[0].string + " " + merge[1].string;
            ranks_[pair] = rank++;
        }
        char32_t other = 256;
        for (int byte = 0; byte < 256; byte++) {
            bool printable = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
            letters_[byte] = utf8({printable ? char32_t(byte) : other++});
        }
    }
    for (const Json& token : file["added_tokens"].items) {
        Text content = code_points(token["content"].string);
        if (token["normalized"].truth) normalized_.emplace_back(normalize(content), token["id"].whole());
        else raw_.emplace_back(content, token["id"].whole());
    }
    auto longer = [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); };
    std::stable_sort(raw_.begin(), raw_.end(), longer);
    std::stable_sort(normalized_.begin(), normalized_.end(), longer);
    const Json& post = file["post_processor"];
    if (post["type"].string == "TemplateProcessing") {
        bool behind = false;
        for (const Json& part : post["single"].items) {
            if (part.has("Sequence")) behind = true;
            else {
                const Json& ids = post["special_tokens"][part["SpecialToken"]["id"].string]["ids"];
                (behind ? after_ : before_).push_back(ids[0].whole());
            }
        }
    } else {
        before_ = {post["cls"][1].whole()};
        after_ = {post["sep"][1].whole()};
    }
}

std::vector<Tokenizer::Part> Tokenizer::without(const Text& text, const Added& added) {
    std::vector<Part> parts;
    size_t start = 0, i = 0;
    auto push = [&](size_t end) {
        if (end > start) parts.push_back({Text(text.begin() + start, text.begin() + end), -1});
    };
    while (i < text.size()) {
        auto found = std::find_if(added.begin(), added.end(), [&](const auto& token) {
            const Text& name = token.first;
            return !name.empty() && i + name.size() <= text.size() &&
                   std::equal(name.begin(), name.end(), text.begin() + i);
        });
        if (found == added.end()) {
            i++;
            continue;
        }
        push(i);
        parts.push_back({{}, found->second});
        start = i += found->first.size();
    }
    push(text.size());
    return parts;
}

Text Tokenizer::normalize(Text text) const {
    auto where = [](const Text& from, auto keep) {
        Text made;
        std::copy_if(from.begin(), from.end(), std::back_inserter(made), keep);
        return made;
    };
    for (const Json& step : normalizers_) {
        const std::string& kind = step["type"].string;
        if (kind == "BertNormalizer") {
            Text made;
            for (char32_t c : where(text, [&](char32_t c) { return !unicode_.is("dropped", c); })) {
                if (unicode_.is("spaces", c)) made.push_back(' ');
                else if (unicode_.is("ideographs", c)) made.insert(made.end(), {U' ', c, U' '});
                else made.push_back(c);
            }
            if (step.truth_or("strip_accents", step["lowercase"].truth)) {
                made = where(unicode_.decompose(made), [&](char32_t c) { return !unicode_.is("accents", c); });
            }
            text = step["lowercase"].truth ? unicode_.lower(made) : made;
        } else if (kind == "NFC") {
            text = unicode_.compose(text);
        } else if (kind == "Lowercase") {
            text = unicode_.lower(text);
        } else if (step["pattern"].has("Regex")) {  // runs of spaces become one
            Text made;
            for (size_t i = 0; i < text.size(); i++) {
                bool space = unicode_.is("spaces", text[i]);
                if (!space) made.push_back(text[i]);
                else if (i == 0 || !unicode_.is("spaces", text[i - 1])) made.push_back(' ');
            }
            text = made;
        } else {  // a learnt token's name becomes what stands for its vectors
            Added name = {{code_points(step["pattern"]["String"].string), 0}};
            Text content = code_points(step["content"].string), made;
            for (const Part& part : without(text, name)) {
                const Text& more = part.id < 0 ? part.text : content;
                made.insert(made.end(), more.begin(), more.end());
            }
            text = made;
        }
    }
    return text;
}

std::vector<Text> Tokenizer::words(const Text& text) const {
    std::vector<Text> words;
    auto is = [&](const char* set, size_t i) { return i < text.size() && unicode_.is(set, text[i]); };
    for (size_t i = 0; i < text.size();) {
        size_t end = i + 1;
        if (is("spaces", i)) {
            i++;
            continue;
        }
        if (is_word_piece_) {
            if (!is("punctuation", i)) {
                while (end < text.size() && !is("spaces", end) && !is("punctuation", end)) end++;
            }
        } else {
            size_t taken = 0;
            for (const char* word : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
                Text name = code_points(word);
                bool here = i + name.size() <= text.size() && std::equal(name.begin(), name.end(), text.begin() + i);
                if (!taken && here) taken = name.size();
            }
            if (taken) {
                end = i + taken;
            } else if (is("letters", i)) {
                while (is("letters", end)) end++;
            } else if (!is("numbers", i)) {
                while (end < text.size() && !is("spaces", end) && !is("letters", end) && !is("numbers", end)) end++;
            }
        }
        words.emplace_back(text.begin() + i, text.begin() + end);
        i = end;
    }
    return words;
}

void Tokenizer::word_piece(const Text& word, std::vector<int32_t>& ids) const {
    size_t kept = ids.size();
    for (size_t start = 0; start < word.size();) {
        size_t end = word.size();
        auto found = vocabulary_.end();
        for (; end > start && word.size() <= longest_word_; end--) {
            std::string piece = utf8(Text(word.begin() + start, word.begin() + end));
            found = vocabulary_.find((start ? prefix_ : "") + piece);
            if (found != vocabulary_.end()) break;
        }
        if (found == vocabulary_.end()) {  // the whole word is one unknown token
            ids.resize(kept);
            ids.push_back(vocabulary_.at(unknown_));
            return;
        }
        ids.push_back(found->second);
        start = end;
    }
}

void Tokenizer::byte_pairs(const Text& word, std::vector<int32_t>& ids) const {
    std::vector<std::string> parts;
    std::string bytes = utf8(word);
    for (size_t i = 0; i < bytes.size(); i++) {
        std::string part = letters_[static_cast<unsigned char>(bytes[i])] + (i + 1 == bytes.size() ? suffix_ : "");
        if (!vocabulary_.count(part)) part = unknown_;
        if (!part.empty()) parts.push_back(part);
    }
    while (parts.size() > 1) {
        int best = INT_MAX;
        std::string pair;
        for (size_t i = 0; i + 1 < parts.size(); i++) {
            auto found = ranks_.find(parts[i] + " " + parts[i + 1]);
            if (found != ranks_.end() && found->second < best) {
                best = found->second;
                pair = found->first;
            }
        }
        if (best == INT_MAX) break;
        std::vector<std::string> made;
        for (size_t i = 0; i < parts.size(); i++) {
            if (i + 1 < parts.size() && parts[i] + " " + parts[i + 1] == pair) {
                made.push_back(parts[i] + parts[i + 1]);
                i++;
            } else {
                made.push_back(parts[i]);
            }
        }
        parts = made;
    }
    for (const std::string& part : parts) ids.push_back(vocabulary_.at(part));
}

void Tokenizer::pieces(const Text& word, std::vector<int32_t>& ids) const {
    if (is_word_piece_) word_piece(word, ids);
    else byte_pairs(word, ids);
}

Tokens Tokenizer::encode(const std::string& prompt) const {
    std::vector<int32_t> ids;
    for (const Part& part : without(code_points(prompt), raw_)) {
        if (part.id >= 0) {
            ids.push_back(part.id);
            continue;
        }
        for (const Part& inner : without(normalize(part.text), normalized_)) {
            if (inner.id >= 0) ids.push_back(inner.id);
            else for (const Text& word : words(inner.text)) pieces(word, ids);
        }
    }
    size_t room = length_ - before_.size() - after_.size();
    if (ids.size() > room) ids.resize(room);
    ids.insert(ids.begin(), before_.begin(), before_.end());
    ids.insert(ids.end(), after_.begin(), after_.end());
    Tokens tokens;
    tokens.count = static_cast<int>(ids.size());
    tokens.mask.assign(length_, 0);
    std::fill_n(tokens.mask.begin(), ids.size(), 1);
    ids.resize(length_, padding_);
    tokens.ids = ids;
    return tokens;
}
