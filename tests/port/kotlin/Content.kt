package android.content.res

import java.io.InputStream

abstract class AssetManager {
    abstract fun open(fileName: String): InputStream

    abstract fun list(path: String): Array<String>?
}
