import Foundation

/// x' = a x + b output + noise z + previous x_0 of the step before; the UNet is asked of x = alpha x_0 + sigma epsilon.
struct Step {
    let timestep, alpha, sigma, a, b, noise, previous: Double
}

/// The steps of a sampler, by the manifest's `scheduler`: all of its numbers are known before the first one.
struct Schedule {
    private struct Level {
        let alpha, sigma: Double

        init(_ alpha: Double, _ sigma: Double) {
            self.alpha = alpha
            self.sigma = sigma
        }

        init(bar: Double) { self.init(bar.squareRoot(), (1 - bar).squareRoot()) }

        init(sigma: Double) {
            let alpha = 1 / (sigma * sigma + 1).squareRoot()
            self.init(alpha, sigma * alpha)
        }
    }

    private let spec: Json
    private let count: Int
    private let n: Int
    private var bars: [Double] = []
    private var sigmas: [Double] = []
    private(set) var steps: [Step] = []
    private(set) var initialScale = 1.0

    init(_ spec: Json, sampler: String, count: Int, eta: Double? = nil) throws {
        self.spec = spec
        self.count = count
        n = spec["num_train_timesteps"].int
        let roots = spec["beta_schedule"].string == "scaled_linear"
        let ends = ["beta_start", "beta_end"].map { roots ? spec[$0].double!.squareRoot() : spec[$0].double! }
        var product = 1.0
        for i in 0..<n {
            let beta = Self.between(ends[0], ends[1], i, n)
            product *= 1 - (roots ? beta * beta : beta)
            bars.append(product)
        }
        sigmas = bars.map { ((1 - $0) / $0).squareRoot() }
        switch sampler {
        case "ddim": ddim()
        case "euler": euler(ancestral: false)
        case "euler-ancestral": euler(ancestral: true)
        case "dpmpp-2m":
            let grid = spaced(aboveZero: true)
            multistep(grid, grid.map { sigmas[$0] })
        case "dpmpp-2m-karras": karras()
        case "lcm": lcm()
        case "tcd": tcd(eta ?? spec["eta"].double ?? 0.3)
        default: throw PocketfusionError.bundle("the sampler \(sampler) is not known")
        }
    }

    private mutating func add(
        _ t: Double, _ now: Level, _ x0: Double, _ epsilon: Double, noise: Double = 0, previous: Double = 0
    ) {
        let byEpsilon = spec["prediction_type"].string == "epsilon"
        let a = byEpsilon ? x0 / now.alpha : x0 * now.alpha + epsilon * now.sigma
        let b = byEpsilon ? epsilon - x0 * now.sigma / now.alpha : epsilon * now.alpha - x0 * now.sigma
        steps.append(
            Step(timestep: t, alpha: now.alpha, sigma: now.sigma, a: a, b: b, noise: noise, previous: previous))
    }

    /// Value i of `count` from `first` to `last` in equal parts.
    private static func between(_ first: Double, _ last: Double, _ i: Int, _ count: Int) -> Double {
        if i > 0, i == count - 1 { return last }
        return Double(i) * ((last - first) / Double(max(count - 1, 1))) + first
    }

    private func spaced(aboveZero: Bool) -> [Int] {
        let more = aboveZero ? 1 : 0
        func rounded(_ x: Double) -> Int { Int(x.rounded(.toNearestOrEven)) }
        switch spec["timestep_spacing"].string {
        case "trailing":
            let apart = Double(n) - Double(n) / Double(count) - Double(n)
            return (0..<count).map { rounded(Double(n) + Double($0) * apart) - 1 }
        case "linspace":
            return (0..<count).map { rounded(Self.between(0, Double(n - 1), count - 1 - $0 + more, count + more)) }
        default:
            let falling = (0..<count).map { (count - 1 - $0 + more) * (n / (count + more)) }
            let offset = min(spec["steps_offset"].int, n - 1 - falling[0])
            return falling.map { $0 + offset }
        }
    }

    private func distilled() -> [Int] {
        let original = min(50, n)
        return (0..<count).map { k in
            (original - Int((Double(k) * (Double(original) / Double(count))).rounded(.down))) * (n / original) - 1
        }
    }

    private mutating func ddim() {
        for t in spaced(aboveZero: false) {
            let then = t - n / count
            let end = spec["set_alpha_to_one"].bool ?? true ? 1 : bars[0]
            let later = Level(bar: then >= 0 ? bars[then] : end)
            add(Double(t), Level(bar: bars[t]), later.alpha, later.sigma)
        }
    }

    private var finalSigma: Double { spec["final_sigmas_type"].string == "sigma_min" ? sigmas[0] : 0 }

    private mutating func euler(ancestral: Bool) {
        let spacing = spec["timestep_spacing"].string
        let grid =
            spacing == "linspace"
            ? (0..<count).map { Double(Float(Self.between(0, Double(n - 1), count - 1 - $0, count))) }
            : spaced(aboveZero: false).map(Double.init)
        let levels = grid.map { t -> Double in
            let low = min(Int(t), n - 2)
            return (sigmas[low + 1] - sigmas[low]) * (t - Double(low)) + sigmas[low]
        } + [ancestral ? 0 : finalSigma]
        if spacing != "leading" { initialScale = Level(sigma: levels[0]).sigma }
        for k in 0..<count {
            let (now, later) = (levels[k], levels[k + 1])
            let up = ancestral ? (later * later * (now * now - later * later)).squareRoot() / now : 0
            let down = (later * later - up * up).squareRoot()
            let scale = k < count - 1 ? Level(sigma: later).alpha : 1
            add(grid[k], Level(sigma: now), scale, scale * down, noise: scale * up)
        }
    }

    private mutating func karras() {
        let (first, last) = (pow(sigmas[n - 1], 1.0 / 7), pow(sigmas[0], 1.0 / 7))
        let logs = sigmas.map { log($0) }
        let levels = (0..<count).map { pow(first + Self.between(0, 1, $0, count) * (last - first), 7) }
        let grid = levels.map { sigma -> Int in
            let wanted = log(sigma)
            guard let high = logs.firstIndex(where: { $0 > wanted }) else { return n - 1 }
            if high == 0 { return 0 }
            let part = (wanted - logs[high - 1]) / (logs[high] - logs[high - 1])
            return Int((Double(high - 1) + part).rounded(.toNearestOrEven))
        }
        multistep(grid, levels)
    }

    /// DPM-Solver++(2M): a first-order step is DDIM's; a second-order one adds to x_0 what it changed by.
    private mutating func multistep(_ grid: [Int], _ levels: [Double]) {
        let end = finalSigma
        for k in 0..<count {
            let now = levels[k]
            let later = k + 1 < count ? levels[k + 1] : end
            let next = Level(sigma: later)
            var change = 0.0
            if k > 0, k < count - 1 || (end > 0 && count >= 15) {
                change = next.alpha * (1 - later / now) * log(now / later) / (2 * log(levels[k - 1] / now))
            }
            add(Double(grid[k]), Level(sigma: now), next.alpha + change, next.sigma, previous: -change)
        }
    }

    private mutating func lcm() {
        let grid = distilled()
        for (k, t) in grid.enumerated() {
            let now = Level(bar: bars[t])
            let scaled = Double(t) * 10
            let skip = 0.25 / (scaled * scaled + 0.25)
            let out = scaled / (scaled * scaled + 0.25).squareRoot()
            let later = k + 1 < count ? Level(bar: bars[grid[k + 1]]) : Level(1, 0)
            let (x0, epsilon) = (later.alpha * (out + skip * now.alpha), later.alpha * skip * now.sigma)
            add(Double(t), now, x0, epsilon, noise: later.sigma)
        }
    }

    private mutating func tcd(_ eta: Double) {
        let grid = distilled()
        for (k, t) in grid.enumerated() {
            let later = k + 1 < count ? grid[k + 1] : 0
            let target = Int(((1 - eta) * Double(later)).rounded(.down))
            let level = Level(bar: bars[target])
            let kept = bars[later] / bars[target]
            let root = kept.squareRoot()
            add(Double(t), Level(bar: bars[t]), root * level.alpha, root * level.sigma, noise: (1 - kept).squareRoot())
        }
    }
}

/// The UNet's input `timestep_embedding`, one row, by the manifest's `time_embedding`.
func timestepEmbedding(_ timestep: Double, _ spec: Json) -> [Float] {
    let dim = spec["dim"].int
    let half = dim / 2
    let shift = Float(Double(half) - (spec["downscale_freq_shift"].double ?? 0))
    let flip = spec["flip_sin_to_cos"].bool ?? true
    var values = [Float](repeating: 0, count: dim)
    for i in 0..<half {
        let exponent = Float(-log(10000.0)) * Float(i) / shift
        let angle = Double(Float(timestep) * Float(exp(Double(exponent))))
        values[flip ? half + i : i] = Float(sin(angle))
        values[flip ? i : half + i] = Float(cos(angle))
    }
    return values
}

/// The UNet's input `timestep_cond` of a bundle whose guidance is embedded.
func guidanceEmbedding(_ scale: Double, _ dim: Int) -> [Float] {
    let half = dim / 2
    var values = [Float](repeating: 0, count: dim)
    for i in 0..<half {
        let angle = 1000 * (scale - 1) * pow(10000, -(Double(i) / Double(max(half - 1, 1))))
        values[i] = Float(sin(angle))
        values[half + i] = Float(cos(angle))
    }
    return values
}
