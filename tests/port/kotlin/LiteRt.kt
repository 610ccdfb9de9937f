// Stands for LiteRT's Android library: its public signatures (2.3.0) as far as the example calls them, and networks that
// answer with what `pocketfusion vectors` recorded, after comparing what they are given with it.
package com.google.ai.edge.litert

import java.io.File

enum class Accelerator { NONE, CPU, GPU, NPU }

class LiteRtException(message: String) : Exception(message)

abstract class JniHandle : AutoCloseable {
    private var closed = false

    protected fun assertNotDestroyed() = check(!closed) { "used after close" }

    override fun close() {
        assertNotDestroyed()
        closed = true
    }
}

class Environment private constructor() : JniHandle() {
    companion object {
        @JvmStatic
        fun create(): Environment = Environment()
    }
}

class TensorBuffer internal constructor() : JniHandle() {
    internal var floats: FloatArray? = null
    internal var ints: IntArray? = null

    fun writeInt(data: IntArray) {
        assertNotDestroyed()
        ints = data.copyOf()
    }

    fun writeFloat(data: FloatArray) {
        assertNotDestroyed()
        floats = data.copyOf()
    }

    fun readFloat(): FloatArray {
        assertNotDestroyed()
        return floats!!.copyOf()
    }
}

class CompiledModel private constructor(private val network: String) : JniHandle() {
    data class CpuOptions(val numThreads: Int? = null, val xnnPackFlags: Int? = null, val xnnPackWeightCachePath: String? = null)

    data class GpuOptions(
        val constantTensorSharing: Boolean? = null,
        val infiniteFloatCapping: Boolean? = null,
        val benchmarkMode: Boolean? = null,
        val allowSrcQuantizedFcConvOps: Boolean? = null,
        val precision: Precision? = null,
    ) {
        enum class Precision { DEFAULT, FP16, FP32 }
    }

    class Options(internal val accelerators: Set<Accelerator>) {
        constructor(vararg accelerators: Accelerator) : this(setOf(*accelerators))

        var cpuOptions: CpuOptions? = null
        var gpuOptions: GpuOptions? = null
    }

    private var call = 0

    fun createInputBuffer(inputName: String, signature: String? = null): TensorBuffer = TensorBuffer()

    fun createOutputBuffer(outputName: String, signature: String? = null): TensorBuffer = TensorBuffer()

    fun run(inputs: Map<String, TensorBuffer>, outputs: Map<String, TensorBuffer>, signature: String? = null) {
        assertNotDestroyed()
        for ((name, buffer) in inputs) {
            val wanted = Npy.read(File(kit, "$network.$name.npy"))
            val given = buffer.floats?.let { it.map(Float::toRawBits) } ?: buffer.ints!!.toList()
            check(given == wanted.call(call)) { "call $call of the $network: $name is not what was recorded" }
        }
        for ((name, buffer) in outputs) buffer.floats = Npy.read(File(kit, "$network.$name.npy")).call(call)
            .map { Float.fromBits(it) }.toFloatArray()
        call++
    }

    companion object {
        lateinit var kit: File
        val opened = ArrayList<Pair<String, Options>>()

        @JvmStatic
        @JvmOverloads
        fun create(filePath: String, options: Options = Options(Accelerator.CPU), optionalEnv: Environment? = null): CompiledModel {
            check(File(filePath).exists() && optionalEnv != null)
            opened += File(filePath).nameWithoutExtension to options
            return CompiledModel(File(filePath).nameWithoutExtension)
        }
    }
}

/** A .npy file of 32-bit numbers, as their bits. */
class Npy(val shape: List<Int>, val bits: IntArray) {
    fun call(index: Int): List<Int> = (bits.size / shape[0]).let { bits.asList().subList(index * it, (index + 1) * it) }

    companion object {
        fun read(file: File): Npy {
            val bytes = java.nio.ByteBuffer.wrap(file.readBytes()).order(java.nio.ByteOrder.LITTLE_ENDIAN)
            val length = bytes.getShort(8).toInt()
            val header = String(bytes.array(), 10, length)
            check("'fortran_order': False" in header && ("'<f4'" in header || "'<i4'" in header)) { header }
            val shape = header.substringAfter("(").substringBefore(")").split(",").filter { it.isNotBlank() }.map { it.trim().toInt() }
            bytes.position(10 + length)
            return Npy(shape, IntArray(bytes.remaining() / 4) { bytes.getInt() })
        }
    }
}
