package pocketfusion

import java.math.BigInteger
import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.ln1p
import kotlin.math.roundToInt
import kotlin.math.sqrt

/**
 * Standard normal numbers of a seed, equal to numpy's `Generator(PCG64(seed)).standard_normal(n, float32)`.
 *
 * PCG64 is O'Neill's XSL-RR 128/64 (HMC-CS-2014-0905), seeded by her seed_seq as numpy's SeedSequence has it; the normal
 * numbers are Marsaglia and Tsang's ziggurat (J. Stat. Software 5(8), 2000) of 256 layers in float32.
 */
class Noise(seed: Long) {
    private var state: BigInteger
    private val increment: BigInteger
    private var spare: Int? = null

    init {
        var constant = 0x43b0d7e5
        fun hash(given: Int): Int {
            val value = given xor constant
            constant *= 0x931e8875.toInt()
            return mixed(value * constant)
        }
        fun mix(x: Int, y: Int) = mixed(x * 0xca01f9dd.toInt() - y * 0x4973f715)
        val pool = IntArray(4) { hash(if (it == 0) seed.toInt() else if (it == 1) (seed ushr 32).toInt() else 0) }
        for (from in 0..3) for (to in 0..3) if (from != to) pool[to] = mix(pool[to], hash(pool[from]))
        var last = 0x8b51f9dd.toInt()
        val words = List(8) {
            val value = pool[it % 4] xor last
            last *= 0x58f38ded
            BigInteger.valueOf(mixed(value * last).toLong() and 0xffffffffL)
        }
        fun wide(low: Int) = words[low].or(words[low + 1].shiftLeft(32))
        increment = wide(4).shiftLeft(64).or(wide(6)).shiftLeft(1).or(BigInteger.ONE).and(MASK)
        state = increment.add(wide(0).shiftLeft(64).or(wide(2))).and(MASK)
        advance()
    }

    /** The next ones. */
    fun draw(count: Int): FloatArray = FloatArray(count) { normal() }

    private fun advance() {
        state = state.multiply(MULTIPLIER).add(increment).and(MASK)
    }

    private fun word(): Int {
        spare?.let {
            spare = null
            return it
        }
        advance()
        val folded = state.shiftRight(64).toLong() xor state.toLong()
        val value = java.lang.Long.rotateRight(folded, state.shiftRight(122).toInt())
        spare = (value ushr 32).toInt()
        return value.toInt()
    }

    private fun uniform(): Float = (word() ushr 8) * (1f / 16777216f)

    private fun normal(): Float {
        while (true) {
            val bits = word()
            val layer = bits and 255
            val size = bits ushr 9 and 0x7fffff
            val x = size * WIDTH[layer] * if (bits and 256 != 0) -1f else 1f
            if (size < INSIDE[layer]) return x
            if (layer == 0) return tail(size)
            val between = (HEIGHT[layer - 1] - HEIGHT[layer]) * uniform() + HEIGHT[layer]
            if (between < exp(-0.5 * x * x)) return x
        }
    }

    /** Beyond the lowest layer (Marsaglia, 1964). */
    private fun tail(size: Int): Float {
        while (true) {
            val x = (1 / EDGE).toFloat() * -ln1p(-uniform().toDouble()).toFloat()
            val y = -ln1p(-uniform().toDouble()).toFloat()
            if (y + y > x * x) return (EDGE.toFloat() + x) * if (size ushr 8 and 1 != 0) -1f else 1f
        }
    }

    private companion object {
        val MASK: BigInteger = BigInteger.ONE.shiftLeft(128).subtract(BigInteger.ONE)
        val MULTIPLIER = BigInteger("2360ed051fc65da44385df649fccf645", 16)
        const val EDGE = 3.6541528853610088
        const val AREA = 0.00492867323399 // of each layer
        val WIDTH = FloatArray(256) // of a unit, 2^-23 of the layer
        val HEIGHT = FloatArray(256) // the density at its edge
        val INSIDE = IntArray(256) // units that surely lie below the density

        init {
            val units = 8388608.0
            fun density(x: Double) = exp(-0.5 * x * x)
            val base = AREA / density(EDGE)
            INSIDE[0] = (EDGE / base * units).roundToInt()
            WIDTH[0] = (base / units).toFloat()
            WIDTH[255] = (EDGE / units).toFloat()
            HEIGHT[0] = 1f
            HEIGHT[255] = density(EDGE).toFloat()
            var before = EDGE
            for (i in 254 downTo 1) {
                val edge = sqrt(-2 * ln(AREA / before + density(before)))
                INSIDE[i + 1] = (edge / before * units).roundToInt()
                WIDTH[i] = (edge / units).toFloat()
                HEIGHT[i] = density(edge).toFloat()
                before = edge
            }
        }

        fun mixed(value: Int): Int = value xor (value ushr 16)
    }
}
