/// Ids and mask of a prompt, both of the text encoder's length; `count` of them are no padding.
struct Tokens {
    let ids: [Int32]
    let mask: [Int32]
    let count: Int
}

/// A bundle's tokenizer.json, WordPiece or CLIP's byte pairs, with the manifest's `tokenizer`; docs/port.md has the rules.
final class Tokenizer {
    private typealias Text = ArraySlice<UInt32>

    private enum Part {
        case text(Text)
        case added(Int32)
    }

    private let file: Json
    private let spec: Json
    private let unicode: CodePoints
    private let wordPiece: Bool
    private let vocabulary: [[UInt8]: Int32]
    private let prefix: [UInt8]
    private let suffix: [UInt8]
    private let unknown: [UInt8]?
    private let longestWord: Int
    private let normalizers: [Json]
    private var ranks: [[UInt8]: Int] = [:]
    private var raw: [(name: [UInt32], id: Int32)] = []
    private var normalized: [(name: [UInt32], id: Int32)] = []
    private var before: [Int32] = []
    private var after: [Int32] = []

    init(_ file: Json, spec: Json, unicode: CodePoints) {
        self.file = file
        self.spec = spec
        self.unicode = unicode
        let model = file["model"]
        wordPiece = model["type"].string == "WordPiece"
        vocabulary = model["vocab"].fields.mapValues { Int32($0.int) }
        prefix = model["continuing_subword_prefix"].bytes ?? []
        suffix = model["end_of_word_suffix"].bytes ?? []
        unknown = model["unk_token"].bytes
        longestWord = model["max_input_chars_per_word"].int
        let normalizer = file["normalizer"]
        normalizers = normalizer["type"].string == "Sequence" ? normalizer["normalizers"].items : [normalizer]
        for (rank, merge) in model["merges"].items.enumerated() {
            ranks[merge.bytes ?? merge[0].bytes! + [0x20] + merge[1].bytes!] = rank
        }
        for token in file["added_tokens"].items {
            let name = codePoints(token["content"].bytes!)
            if token["normalized"].bool == true {
                normalized.append((normalize(name[...]), Int32(token["id"].int)))
            } else {
                raw.append((name, Int32(token["id"].int)))
            }
        }
        raw.sort { $0.name.count > $1.name.count }
        normalized.sort { $0.name.count > $1.name.count }
        let post = file["post_processor"]
        if post["type"].string == "TemplateProcessing" {
            var behind = false
            for part in post["single"].items {
                if !part["Sequence"].isNull {
                    behind = true
                    continue
                }
                let id = Int32(post["special_tokens"][part["SpecialToken"]["id"].string]["ids"][0].int)
                if behind { after.append(id) } else { before.append(id) }
            }
        } else {
            before = [Int32(post["cls"][1].int)]
            after = [Int32(post["sep"][1].int)]
        }
    }

    func encode(_ prompt: String) -> Tokens {
        var ids: [Int32] = []
        for part in without(codePoints(prompt)[...], raw) {
            guard case .text(let text) = part else {
                if case .added(let id) = part { ids.append(id) }
                continue
            }
            for inner in without(normalize(text)[...], normalized) {
                switch inner {
                case .added(let id): ids.append(id)
                case .text(let text):
                    for word in words(text) { ids += wordPiece ? wordPieces(word) : bytePairs(word) }
                }
            }
        }
        let length = spec["max_length"].int
        let kept = before + Array(ids.prefix(length - before.count - after.count)) + after
        let padding = [Int32](repeating: Int32(spec["pad_token_id"].int), count: length - kept.count)
        return Tokens(ids: kept + padding, mask: (0..<length).map { $0 < kept.count ? 1 : 0 }, count: kept.count)
    }

    /// The text between the added tokens in it, and these: the leftmost first, of several the longest.
    private func without(_ text: Text, _ added: [(name: [UInt32], id: Int32)]) -> [Part] {
        var parts: [Part] = []
        var (start, i) = (text.startIndex, text.startIndex)
        while i < text.endIndex {
            guard let found = added.first(where: { !$0.name.isEmpty && text[i...].starts(with: $0.name) }) else {
                i += 1
                continue
            }
            if i > start { parts.append(.text(text[start..<i])) }
            parts.append(.added(found.id))
            i += found.name.count
            start = i
        }
        if start < text.endIndex { parts.append(.text(text[start...])) }
        return parts
    }

    private func normalize(_ given: Text) -> [UInt32] {
        var text = Array(given)
        for step in normalizers {
            switch step["type"].string {
            case "BertNormalizer": text = bert(text, step)
            case "NFC": text = unicode.compose(text)
            case "Lowercase": text = unicode.lower(text)
            default: text = step["pattern"]["Regex"].isNull ? learnt(text, step) : joinSpaces(text)
            }
        }
        return text
    }

    private func bert(_ text: [UInt32], _ step: Json) -> [UInt32] {
        var made = text.filter { !unicode.isOf("dropped", $0) }.flatMap { c -> [UInt32] in
            if unicode.isOf("spaces", c) { return [0x20] }
            return unicode.isOf("ideographs", c) ? [0x20, c, 0x20] : [c]
        }
        let lowercase = step["lowercase"].bool ?? false
        if step["strip_accents"].bool ?? lowercase {
            made = unicode.decompose(made).filter { !unicode.isOf("accents", $0) }
        }
        return lowercase ? unicode.lower(made) : made
    }

    private func joinSpaces(_ text: [UInt32]) -> [UInt32] {
        let space = text.map { unicode.isOf("spaces", $0) }
        return text.indices.filter { !(space[$0] && $0 > 0 && space[$0 - 1]) }.map { space[$0] ? 0x20 : text[$0] }
    }

    /// A learnt token's name becomes the letters that stand for its vectors.
    private func learnt(_ text: [UInt32], _ step: Json) -> [UInt32] {
        let content = codePoints(step["content"].bytes!)
        return without(text[...], [(codePoints(step["pattern"]["String"].bytes!), 0)]).flatMap { part -> [UInt32] in
            if case .text(let text) = part { return Array(text) }
            return content
        }
    }

    private static let fixed = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"].map { codePoints($0) }

    private func words(_ text: Text) -> [Text] {
        var words: [Text] = []
        func isOf(_ set: String, _ i: Int) -> Bool { i < text.endIndex && unicode.isOf(set, text[i]) }
        var i = text.startIndex
        while i < text.endIndex {
            var end = i + 1
            if isOf("spaces", i) {
                i += 1
                continue
            }
            if wordPiece {
                if !isOf("punctuation", i) {
                    while end < text.endIndex, !isOf("spaces", end), !isOf("punctuation", end) { end += 1 }
                }
            } else if let fixed = Self.fixed.first(where: { text[i...].starts(with: $0) }) {
                end = i + fixed.count
            } else if isOf("letters", i) {
                while isOf("letters", end) { end += 1 }
            } else if !isOf("numbers", i) {
                while end < text.endIndex, !isOf("spaces", end), !isOf("letters", end), !isOf("numbers", end) { end += 1 }
            }
            words.append(text[i..<end])
            i = end
        }
        return words
    }

    private func wordPieces(_ word: Text) -> [Int32] {
        let whole = [vocabulary[unknown!]!]
        if word.count > longestWord { return whole }
        var ids: [Int32] = []
        var start = word.startIndex
        while start < word.endIndex {
            var end = word.endIndex
            var id: Int32?
            while end > start {
                id = vocabulary[(start > word.startIndex ? prefix : []) + utf8(word[start..<end])]
                if id != nil { break }
                end -= 1
            }
            guard let id else { return whole }
            ids.append(id)
            start = end
        }
        return ids
    }

    private func bytePairs(_ word: Text) -> [Int32] {
        let bytes = utf8(word)
        var parts = bytes.indices.compactMap { i -> [UInt8]? in
            let part = Self.letters[Int(bytes[i])] + (i == bytes.count - 1 ? suffix : [])
            return vocabulary[part] == nil ? unknown : part
        }
        while parts.count > 1 {
            let found = (0..<parts.count - 1).compactMap { ranks[parts[$0] + [0x20] + parts[$0 + 1]] }.min()
            guard let best = found else { break }
            var made: [[UInt8]] = []
            var i = 0
            while i < parts.count {
                if i + 1 < parts.count, ranks[parts[i] + [0x20] + parts[i + 1]] == best {
                    made.append(parts[i] + parts[i + 1])
                    i += 1
                } else {
                    made.append(parts[i])
                }
                i += 1
            }
            parts = made
        }
        return parts.map { vocabulary[$0]! }
    }

    /// GPT-2's printable character for each byte: itself where it is one, else those from U+0100 on.
    private static let letters: [[UInt8]] = {
        var next: UInt32 = 256
        return (0..<256).map { (byte: UInt32) in
            let printable = (33...126).contains(byte) || ((161...255).contains(byte) && byte != 173)
            if !printable { next += 1 }
            return utf8([printable ? byte : next - 1])
        }
    }()
}
