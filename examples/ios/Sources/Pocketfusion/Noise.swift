import Foundation

/// Standard normal numbers of a seed, equal to numpy's `Generator(PCG64(seed)).standard_normal(n, float32)`.
///
/// PCG64 is O'Neill's XSL-RR 128/64 (HMC-CS-2014-0905), seeded by her seed_seq as numpy's SeedSequence has it; the normal
/// numbers are Marsaglia and Tsang's ziggurat (J. Stat. Software 5(8), 2000) of 256 layers in float32.
struct Noise {
    private var state: Wide
    private let increment: Wide
    private var spare: UInt32?

    init(seed: UInt64) {
        var constant: UInt32 = 0x43b0_d7e5
        func hash(_ given: UInt32) -> UInt32 {
            let value = given ^ constant
            constant = constant &* 0x931e_8875
            return Self.mixed(value &* constant)
        }
        func mix(_ x: UInt32, _ y: UInt32) -> UInt32 { Self.mixed(x &* 0xca01_f9dd &- y &* 0x4973_f715) }
        var pool = [UInt32(truncatingIfNeeded: seed), UInt32(truncatingIfNeeded: seed >> 32), 0, 0].map(hash)
        for from in 0..<4 {
            for to in 0..<4 where from != to { pool[to] = mix(pool[to], hash(pool[from])) }
        }
        var last: UInt32 = 0x8b51_f9dd
        var words = [UInt64](repeating: 0, count: 4)
        for i in 0..<8 {
            let value = pool[i % 4] ^ last
            last = last &* 0x58f3_8ded
            words[i / 2] |= UInt64(Self.mixed(value &* last)) << UInt64(32 * (i % 2))
        }
        increment = Wide(high: words[2] << 1 | words[3] >> 63, low: words[3] << 1 | 1)
        state = increment.plus(Wide(high: words[0], low: words[1]))
        advance()
    }

    /// The next ones.
    mutating func draw(_ count: Int) -> [Float] { (0..<count).map { _ in normal() } }

    private static func mixed(_ value: UInt32) -> UInt32 { value ^ value >> 16 }

    private mutating func advance() {
        state = state.times(Wide(high: 0x2360_ed05_1fc6_5da4, low: 0x4385_df64_9fcc_f645)).plus(increment)
    }

    private mutating func word() -> UInt32 {
        if let kept = spare {
            spare = nil
            return kept
        }
        advance()
        let folded = state.high ^ state.low
        let turn = state.high >> 58
        let value = folded >> turn | folded << ((64 &- turn) & 63)
        spare = UInt32(value >> 32)
        return UInt32(truncatingIfNeeded: value)
    }

    private mutating func uniform() -> Float { Float(word() >> 8) * (1 / 16_777_216) }

    private mutating func normal() -> Float {
        let layers = Ziggurat.shared
        while true {
            let bits = word()
            let layer = Int(bits & 255)
            let size = bits >> 9 & 0x7fffff
            let x = Float(size) * layers.width[layer] * (bits & 256 == 0 ? 1 : -1)
            if size < layers.inside[layer] { return x }
            if layer == 0 { return tail(size) }
            let product = (layers.height[layer - 1] - layers.height[layer]) * uniform()
            if Double(product + layers.height[layer]) < exp(-0.5 * Double(x) * Double(x)) { return x }
        }
    }

    /// Beyond the lowest layer (Marsaglia, 1964).
    private mutating func tail(_ size: UInt32) -> Float {
        while true {
            let x = Float(1 / Ziggurat.edge) * -log1p(-uniform())
            let y = -log1p(-uniform())
            if y + y > x * x { return (Float(Ziggurat.edge) + x) * (size >> 8 & 1 == 0 ? 1 : -1) }
        }
    }
}

/// 128 bits; Swift's own UInt128 is younger than iOS 17.
private struct Wide {
    var high: UInt64
    var low: UInt64

    func plus(_ other: Wide) -> Wide {
        let (sum, carry) = low.addingReportingOverflow(other.low)
        return Wide(high: high &+ other.high &+ (carry ? 1 : 0), low: sum)
    }

    func times(_ other: Wide) -> Wide {
        let product = low.multipliedFullWidth(by: other.low)
        return Wide(high: product.high &+ high &* other.low &+ low &* other.high, low: product.low)
    }
}

private struct Ziggurat {
    static let edge = 3.6541528853610088
    static let area = 0.00492867323399  // of each layer
    static let shared = Ziggurat()

    var width = [Float](repeating: 0, count: 256)  // of a unit, 2^-23 of the layer
    var height = [Float](repeating: 0, count: 256)  // the density at its edge
    var inside = [UInt32](repeating: 0, count: 256)  // units that surely lie below the density

    init() {
        let units = 8_388_608.0
        func density(_ x: Double) -> Double { exp(-0.5 * x * x) }
        let base = Self.area / density(Self.edge)
        inside[0] = UInt32((Self.edge / base * units).rounded())
        width[0] = Float(base / units)
        width[255] = Float(Self.edge / units)
        height[0] = 1
        height[255] = Float(density(Self.edge))
        var before = Self.edge
        for i in stride(from: 254, through: 1, by: -1) {
            let edge = sqrt(-2 * log(Self.area / before + density(before)))
            inside[i + 1] = UInt32((edge / before * units).rounded())
            width[i] = Float(edge / units)
            height[i] = Float(density(edge))
            before = edge
        }
    }
}
