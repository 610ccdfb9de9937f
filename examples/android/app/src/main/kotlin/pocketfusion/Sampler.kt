package pocketfusion

import kotlin.math.cos
import kotlin.math.exp
import kotlin.math.floor
import kotlin.math.ln
import kotlin.math.pow
import kotlin.math.sin
import kotlin.math.sqrt

/** x' = a x + b output + noise z + previous x_0 of the step before; the UNet is asked of x = alpha x_0 + sigma epsilon. */
class Step(
    val timestep: Double,
    val alpha: Double,
    val sigma: Double,
    val a: Double,
    val b: Double,
    val noise: Double,
    val previous: Double,
)

/** The steps of a sampler, by the manifest's `scheduler`: all of its numbers are known before the first one. */
class Schedule(private val spec: Any?, sampler: String, private val count: Int) {
    private class Level(val alpha: Double, val sigma: Double)

    private val n = spec["num_train_timesteps"].int()
    private val bars = DoubleArray(n)
    private val sigmas: DoubleArray
    val steps = ArrayList<Step>()
    var initialScale = 1.0
        private set

    init {
        val roots = spec["beta_schedule"] == "scaled_linear"
        val (first, last) = listOf("beta_start", "beta_end").map { spec[it].double().let { b -> if (roots) sqrt(b) else b } }
        var product = 1.0
        for (i in 0 until n) {
            val beta = between(first, last, i, n)
            product *= 1 - if (roots) beta * beta else beta
            bars[i] = product
        }
        sigmas = DoubleArray(n) { sqrt((1 - bars[it]) / bars[it]) }
        when (sampler) {
            "ddim" -> ddim()
            "euler" -> euler(false)
            "euler-ancestral" -> euler(true)
            "dpmpp-2m" -> spaced(true).let { grid -> multistep(grid, grid.map { sigmas[it] }) }
            "dpmpp-2m-karras" -> karras()
            "lcm" -> lcm()
            "tcd" -> tcd()
            else -> throw IllegalArgumentException("the sampler $sampler is not known")
        }
    }

    private fun add(t: Number, now: Level, x0: Double, epsilon: Double, noise: Double = 0.0, previous: Double = 0.0) {
        val byEpsilon = spec["prediction_type"] == "epsilon"
        val a = if (byEpsilon) x0 / now.alpha else x0 * now.alpha + epsilon * now.sigma
        val b = if (byEpsilon) epsilon - x0 * now.sigma / now.alpha else epsilon * now.alpha - x0 * now.sigma
        steps += Step(t.toDouble(), now.alpha, now.sigma, a, b, noise, previous)
    }

    private fun spaced(aboveZero: Boolean): List<Int> {
        val more = if (aboveZero) 1 else 0
        return when (spec["timestep_spacing"]) {
            "trailing" -> List(count) { Math.rint(n + it * (n - n.toDouble() / count - n)).toInt() - 1 }
            "linspace" -> List(count) { Math.rint(between(0.0, n - 1.0, count - 1 - it + more, count + more)).toInt() }
            else -> {
                val falling = List(count) { (count - 1 - it + more) * (n / (count + more)) }
                val offset = minOf((spec["steps_offset"] ?: 0.0).int(), n - 1 - falling[0])
                falling.map { it + offset }
            }
        }
    }

    private fun distilled(): List<Int> {
        val original = minOf(50, n)
        return List(count) { (original - floor(it * (original.toDouble() / count)).toInt()) * (n / original) - 1 }
    }

    private fun ddim() {
        for (t in spaced(false)) {
            val then = t - n / count
            val end = if (spec["set_alpha_to_one"] ?: true == true) 1.0 else bars[0]
            val later = ofBar(if (then >= 0) bars[then] else end)
            add(t, ofBar(bars[t]), later.alpha, later.sigma)
        }
    }

    private fun finalSigma(): Double = if (spec["final_sigmas_type"] == "sigma_min") sigmas[0] else 0.0

    private fun euler(ancestral: Boolean) {
        val linspace = spec["timestep_spacing"] == "linspace"
        val grid = if (!linspace) spaced(false).map { it.toDouble() }
        else List(count) { between(0.0, n - 1.0, count - 1 - it, count).toFloat().toDouble() }
        val levels = grid.map { t ->
            val low = minOf(t.toInt(), n - 2)
            (sigmas[low + 1] - sigmas[low]) * (t - low) + sigmas[low]
        } + if (ancestral) 0.0 else finalSigma()
        if (spec["timestep_spacing"] != "leading") initialScale = ofSigma(levels[0]).sigma
        for (k in 0 until count) {
            val (now, later) = levels.subList(k, k + 2)
            val up = if (ancestral) sqrt(later * later * (now * now - later * later)) / now else 0.0
            val down = sqrt(later * later - up * up)
            val scale = if (k < count - 1) ofSigma(later).alpha else 1.0
            add(grid[k], ofSigma(now), scale, scale * down, scale * up)
        }
    }

    private fun karras() {
        val (first, last) = listOf(sigmas.last(), sigmas.first()).map { it.pow(1.0 / 7) }
        val logs = sigmas.map { ln(it) }
        val levels = List(count) { (first + between(0.0, 1.0, it, count) * (last - first)).pow(7) }
        val grid = levels.map { sigma ->
            val wanted = ln(sigma)
            val high = logs.indexOfFirst { it > wanted }
            when (high) {
                -1 -> n - 1
                0 -> 0
                else -> Math.rint(high - 1 + (wanted - logs[high - 1]) / (logs[high] - logs[high - 1])).toInt()
            }
        }
        multistep(grid, levels)
    }

    /** DPM-Solver++(2M): a first-order step is DDIM's; a second-order one adds to x_0 what it changed by. */
    private fun multistep(grid: List<Int>, levels: List<Double>) {
        val end = finalSigma()
        for (k in levels.indices) {
            val now = levels[k]
            val later = levels.getOrElse(k + 1) { end }
            val next = ofSigma(later)
            var change = 0.0
            if (k > 0 && (k < count - 1 || end > 0 && count >= 15)) {
                change = next.alpha * (1 - later / now) * ln(now / later) / (2 * ln(levels[k - 1] / now))
            }
            add(grid[k], ofSigma(now), next.alpha + change, next.sigma, 0.0, -change)
        }
    }

    private fun lcm() {
        val grid = distilled()
        for ((k, t) in grid.withIndex()) {
            val now = ofBar(bars[t])
            val scaled = t * 10.0
            val skip = 0.25 / (scaled * scaled + 0.25)
            val out = scaled / sqrt(scaled * scaled + 0.25)
            val later = if (k + 1 < count) ofBar(bars[grid[k + 1]]) else Level(1.0, 0.0)
            add(t, now, later.alpha * (out + skip * now.alpha), later.alpha * skip * now.sigma, later.sigma)
        }
    }

    private fun tcd() {
        val grid = distilled()
        for ((k, t) in grid.withIndex()) {
            val later = grid.getOrElse(k + 1) { 0 }
            val target = floor((1 - (spec["eta"] ?: 0.3).double()) * later).toInt()
            val level = ofBar(bars[target])
            val kept = bars[later] / bars[target]
            add(t, ofBar(bars[t]), sqrt(kept) * level.alpha, sqrt(kept) * level.sigma, sqrt(1 - kept))
        }
    }

    private companion object {
        fun ofBar(bar: Double) = Level(sqrt(bar), sqrt(1 - bar))

        fun ofSigma(sigma: Double): Level {
            val alpha = 1 / sqrt(sigma * sigma + 1)
            return Level(alpha, sigma * alpha)
        }

        /** Value i of `count` from `first` to `last` in equal parts. */
        fun between(first: Double, last: Double, i: Int, count: Int): Double =
            if (i > 0 && i == count - 1) last else i * ((last - first) / maxOf(count - 1, 1)) + first
    }
}

/** The UNet's input `timestep_embedding`, one row, by the manifest's `time_embedding`. */
fun timestepEmbedding(timestep: Double, spec: Any?): FloatArray {
    val dim = spec["dim"].int()
    val half = dim / 2
    val shift = (half - (spec["downscale_freq_shift"] ?: 0.0).double()).toFloat()
    val flip = spec["flip_sin_to_cos"] ?: true == true
    val values = FloatArray(dim)
    for (i in 0 until half) {
        val exponent = (-ln(10000.0)).toFloat() * i / shift
        val angle = timestep.toFloat() * exp(exponent.toDouble()).toFloat()
        values[if (flip) half + i else i] = sin(angle.toDouble()).toFloat()
        values[if (flip) i else half + i] = cos(angle.toDouble()).toFloat()
    }
    return values
}

/** The UNet's input `timestep_cond` of a bundle whose guidance is embedded. */
fun guidanceEmbedding(scale: Double, dim: Int): FloatArray {
    val half = dim / 2
    val values = FloatArray(dim)
    for (i in 0 until half) {
        val angle = 1000 * (scale - 1) * 10000.0.pow(-(i.toDouble() / maxOf(half - 1, 1)))
        values[i] = sin(angle).toFloat()
        values[half + i] = cos(angle).toFloat()
    }
    return values
}
