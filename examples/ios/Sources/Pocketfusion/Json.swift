import Foundation

/// JSON with its texts as UTF-8 bytes. Foundation's reader would not do: Swift's strings are equal where they are
/// canonically equivalent, and a vocabulary has such pieces apart.
indirect enum Json {
    case null
    case bool(Bool)
    case number(Double)
    case text([UInt8])
    case list([Json])
    case object([[UInt8]: Json])

    static func parse(_ data: Data) throws -> Json {
        var parser = Parser(bytes: [UInt8](data))
        return try parser.value()
    }

    static func read(_ url: URL) throws -> Json { try parse(Data(contentsOf: url)) }

    /// A field, null where it is missing.
    subscript(_ name: String) -> Json {
        if case .object(let fields) = self { return fields[Array(name.utf8)] ?? .null }
        return .null
    }

    subscript(_ index: Int) -> Json { items[index] }

    var isNull: Bool { if case .null = self { return true } else { return false } }
    var items: [Json] { if case .list(let items) = self { return items } else { return [] } }
    var fields: [[UInt8]: Json] { if case .object(let fields) = self { return fields } else { return [:] } }
    var bytes: [UInt8]? { if case .text(let bytes) = self { return bytes } else { return nil } }
    var string: String { String(decoding: bytes ?? [], as: UTF8.self) }
    var double: Double? { if case .number(let number) = self { return number } else { return nil } }
    var int: Int { Int(double ?? 0) }
    var bool: Bool? { if case .bool(let truth) = self { return truth } else { return nil } }
}

enum PocketfusionError: Error {
    case json(at: Int)
    case bundle(String)
}

private struct Parser {
    let bytes: [UInt8]
    var at = 0

    init(bytes: [UInt8]) { self.bytes = bytes }

    mutating func space() {
        while at < bytes.count, [0x20, 0x0A, 0x0D, 0x09].contains(bytes[at]) { at += 1 }
    }

    mutating func take(_ byte: UInt8) -> Bool {
        space()
        guard at < bytes.count, bytes[at] == byte else { return false }
        at += 1
        return true
    }

    mutating func need(_ byte: UInt8) throws {
        if !take(byte) { throw PocketfusionError.json(at: at) }
    }

    mutating func next() throws -> UInt8 {
        guard at < bytes.count else { throw PocketfusionError.json(at: at) }
        at += 1
        return bytes[at - 1]
    }

    mutating func hex() throws -> UInt32 {
        let digits = String(decoding: [try next(), try next(), try next(), try next()], as: UTF8.self)
        guard let code = UInt32(digits, radix: 16) else { throw PocketfusionError.json(at: at) }
        return code
    }

    mutating func text() throws -> [UInt8] {
        try need(UInt8(ascii: "\""))
        var out: [UInt8] = []
        while true {
            let byte = try next()
            if byte == UInt8(ascii: "\"") { return out }
            if byte != UInt8(ascii: "\\") {
                out.append(byte)
                continue
            }
            switch try next() {
            case UInt8(ascii: "u"):
                var code = try hex()
                if (0xD800..<0xDC00).contains(code), at + 1 < bytes.count, bytes[at] == UInt8(ascii: "\\") {
                    at += 2
                    code = 0x10000 + (code - 0xD800) << 10 + (try hex() - 0xDC00)
                }
                out += Array(String(Unicode.Scalar(code) ?? "\u{FFFD}").utf8)
            case UInt8(ascii: "n"): out.append(0x0A)
            case UInt8(ascii: "r"): out.append(0x0D)
            case UInt8(ascii: "t"): out.append(0x09)
            case UInt8(ascii: "b"): out.append(0x08)
            case UInt8(ascii: "f"): out.append(0x0C)
            case let other: out.append(other)
            }
        }
    }

    mutating func value() throws -> Json {
        space()
        guard at < bytes.count else { throw PocketfusionError.json(at: at) }
        if bytes[at] == UInt8(ascii: "\"") { return .text(try text()) }
        if take(UInt8(ascii: "{")) {
            var fields: [[UInt8]: Json] = [:]
            if take(UInt8(ascii: "}")) { return .object(fields) }
            repeat {
                space()
                let name = try text()
                try need(UInt8(ascii: ":"))
                fields[name] = try value()
            } while take(UInt8(ascii: ","))
            try need(UInt8(ascii: "}"))
            return .object(fields)
        }
        if take(UInt8(ascii: "[")) {
            var items: [Json] = []
            if take(UInt8(ascii: "]")) { return .list(items) }
            repeat { items.append(try value()) } while take(UInt8(ascii: ","))
            try need(UInt8(ascii: "]"))
            return .list(items)
        }
        for (word, meant) in [("true", Json.bool(true)), ("false", .bool(false)), ("null", .null)]
        where bytes[at...].starts(with: word.utf8) {
            at += word.utf8.count
            return meant
        }
        let start = at
        while at < bytes.count, "+-.eE0123456789".utf8.contains(bytes[at]) { at += 1 }
        guard let number = Double(String(decoding: bytes[start..<at], as: UTF8.self)) else {
            throw PocketfusionError.json(at: start)
        }
        return .number(number)
    }
}
