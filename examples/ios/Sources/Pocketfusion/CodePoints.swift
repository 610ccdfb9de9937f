/// unicode.json: what each code point counts as. The phone's own tables are of whatever Unicode version its iOS has, and
/// token ids must not depend on that.
final class CodePoints {
    private var sets: [String: [(first: UInt32, last: UInt32)]] = [:]
    private var lowered: [UInt32: [UInt32]] = [:]
    private var decomposed: [UInt32: [UInt32]] = [:]
    private var classes: [UInt32: Int] = [:]
    private var composed: [UInt64: UInt32] = [:]

    init(_ data: Json) {
        for name in ["dropped", "spaces", "ideographs", "accents", "punctuation", "letters", "numbers"] {
            sets[name] = data[name].items.map { (UInt32($0[0].int), UInt32($0[1].int)) }
        }
        lowered = Self.table(data["lower"])
        decomposed = Self.table(data["decomposed"])
        for row in data["classes"].items {
            for c in row[0].int...row[1].int { classes[UInt32(c)] = row[2].int }
        }
        for row in data["composed"].items {
            composed[UInt64(row[0].int) << 32 | UInt64(row[1].int)] = UInt32(row[2].int)
        }
    }

    private static func table(_ rows: Json) -> [UInt32: [UInt32]] {
        Dictionary(uniqueKeysWithValues: rows.items.map { row in
            let codes = row.items.map { UInt32($0.int) }
            return (codes[0], Array(codes.dropFirst()))
        })
    }

    func isOf(_ set: String, _ c: UInt32) -> Bool {
        let ranges = sets[set]!
        var (low, high) = (0, ranges.count)
        while low < high {
            let middle = (low + high) / 2
            if ranges[middle].first <= c { low = middle + 1 } else { high = middle }
        }
        return low > 0 && ranges[low - 1].last >= c
    }

    func lower(_ text: [UInt32]) -> [UInt32] { text.flatMap { lowered[$0] ?? [$0] } }

    func decompose(_ text: [UInt32]) -> [UInt32] {
        var made: [UInt32] = []
        for c in text {
            if (0xAC00..<0xD7A4).contains(c) {  // Hangul
                let index = c - 0xAC00
                made += [0x1100 + index / 588, 0x1161 + index % 588 / 28]
                if index % 28 > 0 { made.append(0x11A7 + index % 28) }
            } else {
                made += decomposed[c] ?? [c]
            }
        }
        var start = 0
        while start < made.count {  // marks by class, those of one class as they stand
            var end = start
            while end < made.count, order(made[end]) > 0 { end += 1 }
            let marks = made[start..<end].enumerated()
            let sorted = marks.sorted { (order($0.element), $0.offset) < (order($1.element), $1.offset) }
            made.replaceSubrange(start..<end, with: sorted.map(\.element))
            start = max(end, start + 1)
        }
        return made
    }

    func compose(_ text: [UInt32]) -> [UInt32] {
        var made: [UInt32] = []
        var starter = -1
        var before = 0  // the class of the last one that stayed behind the starter
        for c in decompose(text) {
            let order = order(c)
            if starter >= 0, before < order || before == 0 && starter == made.count - 1,
                let joined = join(made[starter], c)
            {
                made[starter] = joined
                continue
            }
            if order == 0 { starter = made.count }
            before = order
            made.append(c)
        }
        return made
    }

    private func order(_ c: UInt32) -> Int { classes[c] ?? 0 }

    private func join(_ a: UInt32, _ b: UInt32) -> UInt32? {
        if (0x1100..<0x1113).contains(a), (0x1161..<0x1176).contains(b) {
            return 0xAC00 + ((a - 0x1100) * 21 + b - 0x1161) * 28
        }
        if (0xAC00..<0xD7A4).contains(a), (a - 0xAC00) % 28 == 0, (0x11A8..<0x11C3).contains(b) { return a + b - 0x11A7 }
        return composed[UInt64(a) << 32 | UInt64(b)]
    }
}

func codePoints(_ text: String) -> [UInt32] { text.unicodeScalars.map(\.value) }

func codePoints(_ bytes: [UInt8]) -> [UInt32] { codePoints(String(decoding: bytes, as: UTF8.self)) }

func utf8(_ text: some Sequence<UInt32>) -> [UInt8] {
    text.flatMap { Array(String(Unicode.Scalar($0) ?? "\u{FFFD}").utf8) }
}
